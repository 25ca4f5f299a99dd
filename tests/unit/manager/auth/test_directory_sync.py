"""Users and their directories: other groups, users who leave, and directories that cannot be trusted."""

from __future__ import annotations

import time

import pytest

from dispatcher.manager.auth.local import LocalOptions
from dispatcher.plugin.authenticator import Authenticator, Identity
from dispatcher.plugin.errors import Unavailable
from tests.support.manager_parts import Parts

PEOPLE = ["alice", "bob", "carol"]


@pytest.fixture
def known():
    """What the directory has: name -> identity."""
    return {name: Identity(user=name, groups=frozenset({"staff"}), subject=f"id {name}") for name in PEOPLE}


@pytest.fixture
def parts(tmp_path, known):
    class Directory(Authenticator):
        name = "directory"
        Options = LocalOptions
        down = False
        cannot = False

        def authenticate(self, name, password, *, deadline):
            return known.get(name)

        def lookup(self, name, *, deadline):
            if self.cannot:
                return super().lookup(name, deadline=deadline)
            if self.down:
                raise Unavailable("The directory does not answer")
            return known.get(name)

    found = Parts(tmp_path, authenticator=Directory(options=LocalOptions()))
    found.directory = found.authenticator._wrapped
    for name in PEOPLE:
        assert found.login(name).status_code == 201
    yield found
    found.close()


def sync(parts, **options):
    answer = parts.admin.post("/sync", json=options)
    assert answer.status_code == 202
    end = time.monotonic() + 10
    while parts.admin.get("/sync").json["running"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    return parts.admin.get("/sync").json


def sessions(parts, user):
    return parts.services.sessions.all(user)


def test_nothing_changes_while_everybody_is_there(parts):
    report = sync(parts)
    assert (report["users"], report["asked"]) == (3, 3)
    assert [report[name] for name in ("changed", "left", "back", "removed", "problems")] == [[], [], [], [], []]


def test_groups_become_those_of_the_directory(parts, known):
    known["bob"] = Identity(user="bob", groups=frozenset({"guests"}), subject="id bob")
    assert sync(parts)["changed"] == ["bob"]
    assert parts.supervisor.store.get_user("bob").groups == ("guests",)
    assert ("set_groups", "bob", ["guests"]) in parts.supervisor.calls
    assert len(sessions(parts, "bob")) == 1


def test_a_user_who_has_left_is_signed_out_and_the_agents_stop(parts, known):
    del known["bob"]
    assert sync(parts)["left"] == ["bob"]
    assert sessions(parts, "bob") == []
    assert parts.supervisor.rows["bob"].desired.value == "stopped"
    assert len(sessions(parts, "alice")) == 1
    assert sync(parts)["left"] == [], "once"


def test_an_account_of_another_person_under_the_name_is_no_account_of_the_user(parts, known):
    known["bob"] = Identity(user="bob", subject="id other")
    assert sync(parts)["left"] == ["bob"]
    assert parts.supervisor.store.get_user("bob").subject == "id bob"


def test_an_account_that_only_answers_to_the_name_is_not_the_user_s(parts, known):
    known["bob"] = Identity(user="robert", subject="id bob")
    assert sync(parts)["left"] == ["bob"]


def test_a_user_who_is_back_can_use_the_agents_again(parts, known):
    bob = known.pop("bob")
    sync(parts)
    known["bob"] = bob
    assert sync(parts)["back"] == ["bob"]
    assert parts.supervisor.store.get_user("bob").departed is None
    assert parts.login("bob").status_code == 201


def test_a_dry_run_changes_nothing(parts, known):
    del known["bob"]
    assert sync(parts, dry_run=True)["left"] == ["bob"]
    assert len(sessions(parts, "bob")) == 1
    assert parts.supervisor.store.get_user("bob").departed is None


def test_a_directory_that_is_away_signs_nobody_out(parts, known):
    known.clear()
    parts.directory.down = True
    report = sync(parts)
    assert report["left"] == []
    assert report["problems"] == ["directory: The directory does not answer"]


def test_a_directory_that_has_lost_most_of_its_users_is_not_believed_unless_forced(parts, known):
    for number in range(10):
        name = f"u{number}"
        known[name] = Identity(user=name)
        assert parts.login(name, address=f"192.0.2.{number}").status_code == 201
    known.clear()
    report = sync(parts)
    assert report["left"] == []
    assert "13 of 13 users seem to have left" in report["problems"][0]
    assert len(sessions(parts, "alice")) == 1
    assert len(sync(parts, force=True)["left"]) == 13
    assert sessions(parts, "alice") == []


def test_users_of_a_directory_that_cannot_look_up_are_skipped(parts, known):
    known.clear()
    parts.directory.cannot = True
    report = sync(parts)
    assert (report["left"], report["skipped"], report["problems"]) == ([], {"directory": 3}, [])


def pass_days(parts, days):
    """Let days pass with a synchronisation on each; return who was removed."""
    removed = []
    for _ in range(days):
        parts.clock.time += 86400.0
        removed += sync(parts)["removed"]
    return removed


def test_the_data_of_users_who_left_long_ago_is_deleted_if_that_is_configured(parts, known):
    del known["bob"]
    sync(parts)
    assert pass_days(parts, 10) == []
    parts.keep_departed = 10 * 86400.0
    assert sync(parts, dry_run=True)["removed"] == ["bob"]
    assert "bob" in parts.supervisor.rows
    assert sync(parts)["removed"] == ["bob"]
    assert ("remove", "bob", False) in parts.supervisor.calls
    assert "alice" in parts.supervisor.rows


@pytest.mark.parametrize("wrong", [-50 * 365 * 86400.0, 10 * 365 * 86400.0])
@pytest.mark.parametrize("first", [True, False])
def test_a_clock_that_was_wrong_deletes_nothing(parts, known, wrong, first):
    parts.keep_departed = 10 * 86400.0
    sync(parts)
    parts.clock.time += wrong if first else 0
    del known["bob"]
    assert sync(parts)["left"] == ["bob"]
    parts.clock.time += -wrong if first else wrong
    assert sync(parts)["removed"] == []
    assert pass_days(parts, 8) == []
    assert pass_days(parts, 2) == ["bob"]


def test_data_is_deleted_only_while_the_directory_says_that_the_user_is_gone(parts, known):
    parts.keep_departed = 86400.0
    bob = known.pop("bob")
    sync(parts)
    parts.directory.down = True
    assert pass_days(parts, 3) == []
    parts.directory.down = False
    others = [known.pop(name) for name in ("alice", "carol")]
    assert pass_days(parts, 1) == [], "a directory without any user is not believed"
    known |= {each.user: each for each in [bob, *others]}
    assert sync(parts)["back"] == ["bob"]
    assert pass_days(parts, 3) == []
    assert sorted(parts.supervisor.rows) == PEOPLE


def test_a_directory_that_answers_for_few_users_is_not_believed(parts, known):
    for number in range(20):
        name = f"u{number}"
        known[name] = Identity(user=name)
        assert parts.login(name, address=f"192.0.2.{number}").status_code == 201
    lookup, answers = type(parts.directory).lookup, iter([None] * 8)

    def half_down(self, name, **more):
        if next(answers, "down") == "down":
            raise Unavailable("The directory does not answer")

    type(parts.directory).lookup = half_down
    report = sync(parts)
    type(parts.directory).lookup = lookup
    assert report["left"] == []
    assert "8 of 8 users seem to have left" in report["problems"][-1]


def test_all_users_of_a_small_directory_do_not_leave_at_once(parts, known):
    known.clear()
    assert sync(parts)["left"] == []
    assert sorted(sync(parts, force=True)["left"]) == PEOPLE


@pytest.mark.parametrize("known_again", [True, False])
def test_a_name_that_is_released_meanwhile_is_not_the_account_s_again(parts, known, known_again):
    lookup = type(parts.directory).lookup

    def slow(self, name, **more):
        if name == "bob":
            assert parts.admin.post("/users/bob/release").status_code == 204
        return lookup(self, name, **more)

    if known_again:
        known["bob"] = Identity(user="bob", groups=frozenset({"guests"}), subject="id bob")
    else:
        del known["bob"]
    type(parts.directory).lookup = slow
    sync(parts)
    type(parts.directory).lookup = lookup
    row = parts.supervisor.store.get_user("bob")
    assert (row.source, row.departed) == (None, None)


def test_one_at_a_time(parts):
    assert parts.services.sync._running.acquire(blocking=False)
    assert parts.admin.post("/sync", json={}).status_code == 409
    parts.services.sync._running.release()


def test_before_the_first_one_there_is_nothing_to_show(parts):
    assert parts.admin.get("/sync").status_code == 404


def test_a_sign_in_can_be_tried_without_a_trace(parts, known):
    known["dave"] = Identity(user="Dave", groups=frozenset({"guests"}))
    found = parts.admin.post("/sign-in/test", json={"name": "dave"}).json
    assert found == {
        "accepted": True,
        "refusal": "",
        "authenticator": "directory",
        "user": "dave",
        "groups": ["guests"],
        "configured_groups": [],
        "apps": ["demo"],
        "agents": [],
    }
    assert parts.supervisor.store.get_user("dave") is None
    assert parts.admin.post("/sign-in/test", json={"name": "dave", "password": "x"}).json["accepted"]
    refused = parts.admin.post("/sign-in/test", json={"name": "nobody", "password": "x"}).json
    assert refused == {"accepted": False, "refusal": "wrong name or password, or the user may not sign in"}
    known["bob"] = Identity(user="bob", subject="id other")
    assert "another account" in parts.admin.post("/sign-in/test", json={"name": "bob"}).json["refusal"]
    assert parts.admin.post("/sign-in/test", json={"name": "x", "authenticator": "no"}).status_code == 404


def test_a_released_name_is_the_next_account_s_and_its_sessions_end(parts, known):
    known["bob"] = Identity(user="bob", subject="id other")
    assert parts.login("bob").status_code == 403
    assert parts.admin.post("/users/bob/release").status_code == 204
    assert sessions(parts, "bob") == []
    assert parts.login("bob").status_code == 201
    assert parts.supervisor.store.get_user("bob").subject == "id other"
    assert parts.admin.post("/users/nobody/release").status_code == 404
