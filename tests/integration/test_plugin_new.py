"""`dispatcher plugin new` makes a provider, an authenticator and an observer that work: each passes `plugin check`, and
all three are installed and used through the proxy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.installation import PASSWORD, Installation, until

MADE = {"bare": "provider", "staff": "authenticator", "seen": "observer"}


def dispatcher(*arguments, more=None, **options):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | (
        more or {}
    )
    command = [sys.executable, "-m", "dispatcher", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, **options)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The three projects, as they are made."""
    home = tmp_path_factory.mktemp("plugins")
    for name, kind in MADE.items():
        done = dispatcher("plugin", "new", name, f"--{kind}", cwd=home)
        assert done.returncode == 0, done.stderr
    return home


@pytest.mark.root
@pytest.mark.parametrize("name", MADE)
def test_what_is_made_passes_its_check(home, name):
    before = sorted(home.rglob("*"))
    # No index is asked: the core and what builds a plugin are here.
    more = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    done = dispatcher("--json", "plugin", "check", home / f"dispatcher-{name}", more=more)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["plugins"] == [{"name": name, "kinds": [MADE[name]], "error": ""}]
    assert {test["outcome"] for test in report["tests"]} == {"passed"}
    judged = [test for test in report["tests"] if test["contract"] == MADE[name]]
    assert len(judged) >= {"provider": 60, "authenticator": 40, "observer": 20}[MADE[name]]
    assert sorted(home.rglob("*")) == before


def test_a_check_says_what_is_wrong(home, tmp_path):
    project = tmp_path / "odd"
    assert dispatcher("plugin", "new", "odd", project, "--observer").returncode == 0
    table = (project / "pyproject.toml").read_text()
    (project / "pyproject.toml").write_text(table.replace('odd = "', 'none = "dispatcher_missing"\nodd = "'))
    module = project / "dispatcher_odd.py"
    hook = "def dispatcher_agent_event(event):"
    module.write_text(
        module.read_text().replace(hook, f'{hook}\n    assert event.kind != "moved", "no move"')
        + """
from dispatcher.plugin import Authenticator, Table

class Odd(Authenticator):
    name, Options = "odd", Table
    def authenticate(self, name, password, *, deadline): ...

@hookimpl
def dispatcher_register_authenticators():
    return [Odd]
"""
    )
    done = dispatcher("plugin", "check", project)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "odd: authenticator and observer of dispatcher-odd" in lines
    assert "FAILED  test_odd.py::TestOdd::test_every_kind_of_event_is_taken[moved]" in lines
    assert "dispatcher_agent_event() raised AssertionError (no move" in done.stdout
    assert "No test class derives from AuthenticatorContract" in done.stdout
    assert (
        "The plugin 'none' of dispatcher-odd 1.0 cannot be imported: the Python module dispatcher_missing"
        in done.stdout
    )


def test_a_check_of_a_part_says_that_it_is_one(home):
    done = dispatcher("plugin", "check", "--only", "odd_texts or later_kinds", home / "dispatcher-seen")
    assert done.returncode == 0, done.stdout
    assert "2 of 2 checks of the kit passed" in done.stdout
    assert "Only a part of the tests ran: check again without --only" in done.stdout


@pytest.mark.root
def test_all_three_are_used_through_the_proxy(home, short_tmp, monkeypatch):
    """Somebody signs in by the authenticator, uses an agent of the provider, and the observer sees it."""
    site = short_tmp / "site"
    projects = [home / f"dispatcher-{name}" for name in MADE]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", site]
    done = subprocess.run([*pip, *projects], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("DISPATCHER_SEEN_FILE", str(short_tmp / "events"))
    made = subprocess.run([sys.executable, "-m", "dispatcher_staff", "alice"], input=f"{PASSWORD}\n", text=True,
                          capture_output=True, start_new_session=True, check=True)  # fmt: skip
    (short_tmp / "people").write_text(made.stdout)
    apps = (
        '[apps.web]\nprovider = "bare"\n[apps.web.bare]\ncommand = ["/usr/bin/python3", "{app}", "{{socket}}"]\n'
    )
    extra = f'plugins = ["seen"]\n[auth]\nauthenticator = "staff"\n[auth.staff]\nfile = "{short_tmp}/people"\n'
    with Installation(short_tmp, apps, extra) as house:
        house.start("manager")
        house.start("proxy")
        origin = f"http://127.0.0.1:{house.port}"
        refused = house.web("POST", "/auth/login", {"user": "alice", "password": "wrong"}, Accept="application/json",
                            Origin=origin)  # fmt: skip
        assert refused.status == 403
        answer = house.app(house.login("alice"), "/count")
        assert answer["path"] == "/count"
        row = house.admin("GET", "/agents/alice").json()
        assert (row["state"], row["provider"]) == ("running", "bare")
        assert os.stat(f"/proc/{answer['pid']}").st_uid not in {0, os.geteuid()}
        events = until("the observer has written", lambda: (short_tmp / "events").read_text())
        kinds = [json.loads(line)["kind"] for line in events.splitlines() if json.loads(line)["agent"] == "alice"]
        assert kinds[:3] == ["created", "starting", "ready"]
        (short_tmp / "people").unlink()
        away = house.web("POST", "/auth/login", {"user": "alice", "password": PASSWORD}, Accept="application/json",
                         Origin=origin)  # fmt: skip
        assert away.status == 503
        assert "people" not in away.body.decode()
