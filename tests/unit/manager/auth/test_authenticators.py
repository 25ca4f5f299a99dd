"""Several authenticators: who is asked, whose a name is, and what strangers can learn from it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dispatcher.common.contained import PluginRef
from dispatcher.manager.auth import contained_authenticator, signin
from dispatcher.manager.auth.contained_authenticator import ContainedAuthenticator
from dispatcher.manager.auth.local import LocalOptions
from dispatcher.manager.auth.local import plugin as local_plugin
from dispatcher.plugin.authenticator import Authenticator, Identity, WebAuthenticator
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Unavailable
from tests.support.manager_parts import Parts


def directory(label, people, *, away=False):
    """An authenticator of ``{name: (password, identity)}`` that records whom it is asked for."""

    class Directory(Authenticator):
        name = label
        Options = LocalOptions
        asked: list[str] = []
        down = away

        def authenticate(self, name, password, *, deadline):
            self.asked.append(name)
            if type(self).down:
                raise Unavailable("The directory does not answer")
            known, identity = people.get(name, (None, None))
            return identity if known == password else None

    Directory.asked = []
    return Directory(options=LocalOptions())


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setattr(signin, "STEP", 0.01)
    made = []

    def make(*entries):
        found = Parts(tmp_path, authenticator=entries[0], others=entries[1:])
        cls = local_plugin(found.supervisor.store, found.hasher).dispatcher_register_authenticators()[0]
        ref = type(found.authenticator.plugin)("authenticator", "local")
        found.others.append(type(found.authenticator)(ref, cls(options=cls.Options())))
        found.services.signin = found.new_signin()
        made.append(found)
        return found

    yield make
    for each in made:
        each.close()


def test_an_unknown_name_is_asked_for_in_the_order_of_the_configuration_and_never_in_local(parts):
    one = directory("one", {})
    two = directory("two", {"alice": ("correct horse", Identity(user="alice", groups=frozenset({"staff"})))})
    found = parts(one, two)
    assert found.login("alice").status_code == 201
    assert (one.asked, two.asked) == (["alice"], ["alice"])
    row = found.supervisor.store.get_user("alice")
    assert (row.source, row.groups, row.password_hash) == ("two", ("staff",), None)
    assert found.login("alice").status_code == 201
    assert one.asked == ["alice"], "a known user's password goes to its own authenticator only"


def test_a_local_account_works_while_the_directory_is_away_and_its_password_goes_nowhere_else(parts):
    away = directory("away", {}, away=True)
    found = parts(away)
    assert found.add("root", "correct horse").status_code == 201
    assert found.login("root").status_code == 201
    assert away.asked == []
    assert found.login("alice").status_code == 503
    assert away.asked == ["alice"]


def test_another_directory_is_asked_while_one_is_away(parts):
    away = directory("away", {}, away=True)
    two = directory("two", {"alice": ("correct horse", Identity(user="alice"))})
    found = parts(away, two)
    assert found.login("alice").status_code == 201
    assert found.login("bob").status_code == 503, "it cannot be said that the password is wrong"


@pytest.mark.parametrize("typed", ["root", "root@uni.example"])
def test_an_account_elsewhere_never_gets_the_agents_of_a_local_user_of_that_name(parts, typed):
    people = {typed: ("another horse", Identity(user="root"))}
    found = parts(directory("one", people))
    assert found.add("root", "correct horse").status_code == 201
    assert found.login(typed, "another horse").status_code == 403
    assert found.supervisor.store.get_user("root").source is None
    assert found.login("root").status_code == 201


def test_a_name_that_was_given_to_another_person_is_refused_until_an_administrator_releases_it(parts):
    people = {"alice": ("correct horse", Identity(user="alice", subject="1000"))}
    found = parts(directory("one", people))
    assert found.login("alice").status_code == 201
    people["alice"] = ("correct horse", Identity(user="alice", subject="2000"))
    answer = found.login("alice")
    assert (answer.status_code, answer.json["title"]) == (403, "The name alice belongs to another account")
    people["alice"] = ("correct horse", Identity(user="alice", subject="1000"))
    assert found.login("alice").status_code == 201


@pytest.mark.parametrize("identity", [Identity(user="bob"), Identity(user="alice", subject="2000")])
def test_the_password_of_another_account_is_not_the_user_s(parts, identity):
    people = {"alice": ("correct horse", Identity(user="alice", subject="1000"))}
    found = parts(directory("one", people))
    assert found.login("alice").status_code == 201
    assert found.admin.post("/agents/alice/authenticate", json={"password": "correct horse"}).status_code == 200
    people["alice"] = ("correct horse", identity)
    assert found.admin.post("/agents/alice/authenticate", json={"password": "correct horse"}).status_code == 403


def test_a_released_local_user_becomes_one_of_the_directory(parts):
    found = parts(directory("one", {"alice": ("another horse", Identity(user="alice"))}))
    assert found.add("alice", "correct horse").status_code == 201
    assert found.login("alice", "another horse").status_code == 403
    assert found.admin.post("/users/alice/release").status_code == 204
    assert found.login("alice", "correct horse").status_code == 403
    assert found.login("alice", "another horse").status_code == 201


def test_without_a_directory_nothing_is_released(tmp_path):
    found = Parts(tmp_path)
    assert found.add("alice", "correct horse").status_code == 201
    assert found.admin.post("/users/alice/release").status_code == 409
    assert found.login("alice", "correct horse").status_code == 201
    found.close()


def test_groups_are_those_of_the_last_sign_in(parts):
    people = {"alice": ("correct horse", Identity(user="alice", groups=frozenset({"staff", "b"})))}
    found = parts(directory("one", people))
    found.login("alice")
    people["alice"] = ("correct horse", Identity(user="alice", groups=frozenset({"b"})))
    found.login("alice")
    assert found.supervisor.store.get_user("alice").groups == ("b",)


def test_the_time_of_a_refusal_does_not_show_which_authenticator_knows_the_name(parts, monkeypatch):
    monkeypatch.setattr(signin, "STEP", 0.4)
    found = parts(directory("one", {}))
    assert found.add("root", "correct horse").status_code == 201
    found.login("warm", "wrong horse")

    def seconds(name):
        began = time.monotonic()
        assert found.login(name, "wrong horse").status_code == 403
        return time.monotonic() - began

    assert min(seconds("root"), seconds("nobody")) >= 0.39


def test_refusals_by_all_take_as_long_as_those_of_the_slowest(parts, monkeypatch):
    monkeypatch.setattr(signin, "STEP", 0.125)
    slow = directory("slow", {"bob": ("correct horse", Identity(user="bob"))})
    type(slow).refusal_time = 0.25
    quick = type(slow).authenticate
    type(slow).authenticate = lambda self, *args, **more: quick(self, *args, **more) or time.sleep(0.25)
    found = parts(slow)
    assert found.add("root", "correct horse").status_code == 201
    assert found.login("bob").status_code == 201
    found.login("warm", "wrong horse")
    for name in ("root", "bob", "nobody"):
        began = time.monotonic()
        assert found.login(name, "wrong horse").status_code == 403
        assert time.monotonic() - began >= 0.37, name


def test_beside_a_site_a_wrong_password_takes_as_long_for_a_name_that_is_not_local(parts):
    class Site(WebAuthenticator):
        name = "site"
        Options = LocalOptions
        title = "Site"

        def begin(self, **_):
            raise NotImplementedError

        def finish(self, parameters, **_):
            raise NotImplementedError

    found = parts(Site(options=LocalOptions()))
    assert found.add("root", "correct horse").status_code == 201
    assert found.add("alice", None).status_code == 201
    assert found.supervisor.store.bind_user("alice", "site", "1", ())
    verified = []
    verify = found.hasher.verify
    found.hasher.verify = lambda *args: verified.append(args) or verify(*args)
    for name in ("root", "nobody", "alice"):
        assert found.login(name, "wrong horse").status_code == 403
    assert len(verified) == 3, "a password is hashed for each of them"
    found.supervisor.store.set_password_hash("alice", found.hasher.hash("correct horse"))
    assert found.login("alice").status_code == 403, "the name is the site's"


def test_attempts_at_a_directory_that_is_away_do_not_take_the_places_of_other_users(monkeypatch):
    released = threading.Event()
    asked = []

    class Directory(Authenticator):
        name = "one"
        Options = LocalOptions

        def authenticate(self, name, password, *, deadline):
            asked.append(name)
            if name != "first":
                released.wait(30)
            raise Unavailable("The directory does not answer")

    monkeypatch.setattr(contained_authenticator, "SLOW", 0.0)
    entry = ContainedAuthenticator(PluginRef("authenticator", "one", "acme 1"), Directory(options=LocalOptions()))

    def attempt(name, seconds=30):
        with pytest.raises(Unavailable, match="Passwords cannot be checked at the moment"):
            entry.authenticate(name, "password", deadline=Deadline(seconds))

    def slow(name, count, seconds):
        for at in range(count):
            threads.submit(attempt, f"{name}{at}", seconds)
        end = time.monotonic() + 10
        while f"{name}{count - 1}" not in asked:
            assert time.monotonic() < end
            time.sleep(0.01)

    with ThreadPoolExecutor(100) as threads:
        slow("working", 20, 30)  # many may wait while it works
        attempt("first")
        attempt("stranger")
        assert "stranger" not in asked
        released.set()
    released.clear()
    monkeypatch.setattr(contained_authenticator, "SLACK", 0.0)
    with ThreadPoolExecutor(100) as threads:
        slow("hung", contained_authenticator.MAX_SLOW, 0.0)
        released.set()
        attempt("later")
    assert "later" in asked, "calls that hang for ever do not count"


def test_with_one_authenticator_a_refusal_comes_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(signin, "STEP", 60.0)
    found = Parts(tmp_path)
    began = time.monotonic()
    assert found.login("nobody", "wrong horse").status_code == 403
    assert time.monotonic() - began < 30
    found.close()


def test_a_password_set_by_an_administrator_makes_a_new_user_a_local_one(parts):
    found = parts(directory("one", {"bob": ("another horse", Identity(user="bob"))}))
    assert found.add("bob", None).status_code == 201
    found.services.signin.set_password("bob", "correct horse")
    assert found.login("bob", "another horse").status_code == 403
    assert found.login("bob", "correct horse").status_code == 201


def test_a_password_of_the_directory_is_not_changed_here(parts):
    found = parts(directory("one", {"alice": ("correct horse", Identity(user="alice"))}))
    session = found.login("alice").json["session"]["sha256"]
    assert found.post("/sessions/list", sha256=session).json["changes_passwords"] is False
    assert found.admin.put("/agents/alice/password", json={"password": "x" * 8}).status_code == 422
    assert found.supervisor.store.get_user("alice").password_hash is None


def test_a_user_of_an_authenticator_that_is_not_configured_any_more_cannot_sign_in(parts, capsys):
    one = directory("one", {"alice": ("correct horse", Identity(user="alice"))})
    found = parts(one)
    assert found.login("alice").status_code == 201
    found.authenticator.name = "two"
    found.services.signin = found.new_signin()
    assert found.login("alice").status_code == 403
    assert "it is known from one" in "".join(capsys.readouterr())


def test_a_new_token_needs_the_password_of_the_directory_if_there_is_one(parts, monkeypatch):
    one = directory("one", {"alice": ("correct horse", Identity(user="alice"))})
    found = parts(one)
    session = {"sha256": found.login("alice").json["session"]["sha256"]}
    assert found.post("/sessions/list", **session).json["tokens_need_password"] is True
    assert found.post("/sessions/tokens", **session, address="").status_code == 400
    assert found.post("/sessions/tokens", **session, address="", password="wrong").status_code == 403
    assert found.post("/sessions/tokens", **session, address="", password="correct horse").status_code == 201
    monkeypatch.setattr(type(found.others[0]), "verifies_passwords", False)  # as one that signs in at another site
    assert found.post("/sessions/list", **session).json["tokens_need_password"] is False
    assert found.post("/sessions/tokens", **session, address="").status_code == 201
