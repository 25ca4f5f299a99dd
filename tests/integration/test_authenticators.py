"""Authenticators at fault: each is contained and named; a browser learns nothing, and others sign in meanwhile."""

from __future__ import annotations

import threading
import time

import pytest

from dispatcher.common import contained
from dispatcher.common.contained import PluginRef
from dispatcher.config.plugins import Plugins
from dispatcher.manager import app
from dispatcher.manager.auth import signin
from dispatcher.manager.auth.contained_authenticator import ContainedAuthenticator
from dispatcher.manager.auth.hashing import HashPool
from dispatcher.manager.backends import pool
from dispatcher.plugin.authenticator import Identity
from dispatcher.plugin.errors import DeadlineExceeded
from tests.support import broken
from tests.support.broken import authenticators, providers
from tests.support.broken.authenticators import CASES, REFUSED, RIGHT
from tests.support.manager_parts import Parts
from tests.support.manager_process import client_of, manager_in


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        yield Plugins(broken.install(site))
    providers.release()


@pytest.fixture
def parts(tmp_path, plugins, monkeypatch):
    """Make the manager's parts with an authenticator of that name; calls that hang are given up soon."""
    monkeypatch.setattr(pool, "SLACK", 0.1)
    made = []

    def make(name):
        if name == "auth-hangs":
            monkeypatch.setattr(signin, "TIMEOUT", 0.5)
        cls, ref = plugins.authenticator(name), plugins.ref("authenticator", name)
        contained_one = ContainedAuthenticator(ref, cls(options=cls.Options()))
        made.append(Parts(tmp_path, config={"auth": {"authenticator": name}}, authenticator=contained_one))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_there_are_many_of_them():
    assert len(CASES) + len(REFUSED) >= 25


@pytest.mark.parametrize("name", CASES)
def test_a_sign_in_fails_the_same_whatever_the_reason(parts, capsys, name):
    found = parts(name)
    answer = found.login("alice", RIGHT)
    found.services.signin.check_overdue()
    body = answer.get_data(as_text=True)
    if name == "auth-hangs":
        time.sleep(0.3)
        found.services.signin.check_overdue()
    assert (answer.status_code, answer.json["title"]) == (503, "Passwords cannot be checked at the moment")
    assert answer.json["detail"] == "the manager's log has the reason"
    assert float(answer.headers["Retry-After"]) > 0
    problem = str(found.authenticator.problem)
    assert CASES[name] in problem
    logged = "".join(capsys.readouterr())
    for text in (body, problem, logged):
        assert RIGHT not in text
        assert "10.1.2.3" not in body
        assert len(text) < 10_000
    [state] = [each for each in found.admin.get("/healthz").json["problems"] if "authenticator" in each]
    assert CASES[name] in state


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_not_counted_as_a_wrong_password(parts, name):
    if name == "auth-hangs":
        return  # each would take its time; see below
    found = parts(name)
    assert {found.login("alice", RIGHT).status_code for _ in range(12)} == {503}


def test_a_call_that_waits_until_its_deadline_returns_before_its_caller_gives_up(parts, monkeypatch):
    monkeypatch.setattr(signin, "CALL_TIMEOUT", 0.1)
    found = parts("auth-hangs")

    class Silent(authenticators.Good):
        def authenticate(self, name, password, *, deadline):
            time.sleep(deadline.remaining())
            raise DeadlineExceeded("The directory has not answered in time")

    found.authenticator._wrapped = Silent(options=authenticators.Options())
    assert found.login("alice", RIGHT).json["title"] == "Passwords cannot be checked at the moment"
    assert str(found.authenticator.problem) == "The directory has not answered in time"


def test_calls_that_hang_keep_nobody_else_from_signing_in(parts, caplog):
    found = parts("auth-hangs")
    works = authenticators.Good(options=authenticators.Options())
    hanging = found.authenticator._wrapped.authenticate

    class Sometimes(authenticators.Good):
        def authenticate(self, name, password, *, deadline):
            if name == "alice":
                return works.authenticate(name, password, deadline=deadline)
            return hanging(name, password, deadline=deadline)

    found.authenticator._wrapped = Sometimes(options=authenticators.Options())
    found.pool = HashPool(2, 64, at_once=True)
    found.services.signin = found.new_signin()
    stuck = [threading.Thread(target=found.login, args=(f"u{n}", RIGHT, f"192.0.2.{n}")) for n in range(2, 12)]
    for thread in stuck:
        thread.start()
    assert found.login("alice", RIGHT, "198.51.100.1").status_code == 201
    for thread in stuck:
        thread.join()
    time.sleep(0.2)
    found.services.signin.check_overdue()
    assert found.pool.present == 0
    assert "does not return from authenticate" in caplog.text
    assert "does not return" in str(found.authenticator.problem)
    assert found.login("alice", RIGHT, "198.51.100.1").status_code == 201
    assert found.authenticator.problem is None


@pytest.mark.parametrize("name", REFUSED)
def test_the_manager_runs_without_an_authenticator_that_cannot_be_made(
    tmp_path, short_tmp, monkeypatch, plugins, name
):
    monkeypatch.setattr(contained, "SECONDS", 0.3)
    original = app.Manager
    monkeypatch.setattr(app, "Manager", lambda config: original(config, plugins=Plugins(list(entries(plugins)))))
    with manager_in(short_tmp, monkeypatch, auth={"authenticator": name}) as manager:
        with client_of(manager) as client:
            problems = client.healthz()["problems"]
            assert any(REFUSED[name] in problem and broken.DISTRIBUTION in problem for problem in problems), (
                problems
            )
        answer = manager.services.signin
        with pytest.raises(Exception, match="Passwords cannot be checked at the moment"):
            answer.check("alice", RIGHT, None)


def entries(plugins):
    for found in plugins._entries.values():
        yield from (each.point for each in found)


def test_an_empty_password_never_reaches_an_authenticator(tmp_path):
    """A directory takes it for an anonymous bind, which succeeds: anybody who knows a name could sign in."""

    class AnonymousBind(authenticators.Good):
        name = "bind"

        def authenticate(self, name, password, *, deadline):
            return Identity(user=name)

    directory = ContainedAuthenticator(PluginRef("authenticator", "bind"), AnonymousBind(options=None))
    found = Parts(tmp_path, config={"auth": {"authenticator": "bind"}}, authenticator=directory)
    try:
        assert found.login("alice", "").status_code == 400
        assert found.login("alice", " ").status_code == 201
    finally:
        found.close()
