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


def test_the_data_of_users_who_left_long_ago_is_deleted_if_that_is_configured(parts, known):
    del known["bob"]
    sync(parts)
    parts.clock.time += 100 * 86400.0
    assert sync(parts)["removed"] == []
    parts.keep_departed = 90 * 86400.0
    assert sync(parts, dry_run=True)["removed"] == ["bob"]
    assert "bob" in parts.supervisor.rows
    assert sync(parts)["removed"] == ["bob"]
    assert ("remove", "bob", False) in parts.supervisor.calls
    assert "alice" in parts.supervisor.rows


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
