"""The command line with a real manager: the flow of the ancestor word for word, and every state of an agent."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.installation import PASSWORD, Installation
from tests.support.terminal import on_a_terminal


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    import tempfile
    from pathlib import Path

    base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    base.chmod(0o755)
    with Installation(base, extra='default_app = "web"') as site:
        site.start("manager")
        yield site


@pytest.fixture
def run(site):
    def run(*arguments, stdin=None):
        return subprocess.run(
            [sys.executable, "-m", "dispatcher", *arguments],
            env={**os.environ, "DISPATCHER_CONFIG": str(site.config)},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_the_ancestor_s_flow_word_for_word(site, run):
    environment = {"DISPATCHER_CONFIG": str(site.config)}
    code, out = on_a_terminal(["-k", "add", "carol"], environment, [PASSWORD.encode() + b"\n"] * 2)
    assert code == 0, out
    assert PASSWORD not in out
    assert out.splitlines()[-1] == "carol was added"

    listed = run("list")
    assert listed.returncode == 0
    assert "carol" in listed.stdout
    assert "carol" not in run("running").stdout
    started = run("start", "carol")
    assert (started.returncode, started.stdout) == (0, "carol is running\n")
    assert "carol" in run("running").stdout
    helped = run("--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith("Usage: dispatcher ")
    # The ancestor's spelling of two commands.
    assert run("reset_data", "--yes", "carol").returncode == 0
    assert "carol" in run("memory_usage").stdout
    assert run("remove", "--yes", "carol").stdout == "carol was removed\n"
    assert "carol" not in run("list").stdout


def test_every_state_and_what_is_seen_of_it(site, run):
    def state():
        return json.loads(run("info", "dave", "--json").stdout)["state"]

    assert run("add", "dave", "--password-stdin", stdin=f"{PASSWORD}\n").returncode == 0
    assert state() == "stopped"
    for command, reached in (
        (["start"], "running"),
        (["suspend"], "suspended"),
        (["start"], "running"),
        (["restart"], "running"),
        (["stop"], "stopped"),
    ):
        done = run(*command, "dave")
        assert (done.returncode, done.stdout) == (0, f"dave is {reached}\n"), done.stderr
        assert state() == reached
    assert run("why", "dave").stdout.strip()
    assert "cannot be hibernated" in run("suspend", "--to-disk", "dave").stderr
    assert run("passwd", "dave", "--password-stdin", stdin="another password\n").returncode == 0
    assert run("remove", "--yes", "dave").returncode == 0


def test_a_start_that_fails_is_told_in_one_go(site, run):
    site.config.write_text(
        site.config.read_text()
        + f"""
[apps.broken]
start_timeout = "10s"
max_restarts = 0
[apps.broken.subprocess]
command = ["{sys.executable}", "-c", "print('no config for me'); raise SystemExit(7)", "{{socket}}"]
"""
    )
    assert run("reload").returncode == 0
    assert run("add", "erin", "--app", "broken", "--password-stdin", stdin=f"{PASSWORD}\n").returncode == 0
    done = run("start", "erin")
    assert done.returncode == 1
    first, *rest = done.stderr.splitlines()
    assert first.startswith("dispatcher: ")
    assert "exit code 7" in first
    assert "  | no config for me" in rest
    assert run("remove", "--yes", "erin").returncode == 0


def test_a_forgotten_reload_and_a_reload_of_an_app_that_cannot_start_are_told(site, run):
    before = site.config.read_text()
    site.config.write_text(f'{before}\n[apps.new.subprocess]\ncommand = ["/no/such/program", "{{socket}}"]\n')
    try:
        assert "since the manager read it" in run("doctor").stdout
        assert "`dispatcher reload`" in run("add", "frank", "--app", "new", "--no-password").stderr
        done = run("reload")
        assert done.returncode == 0
        assert "agents cannot start: apps.new.subprocess.command: there is no program" in done.stderr
    finally:
        site.config.write_text(before)
        assert run("reload").returncode == 0


def test_nobody_and_twice(site, run):
    assert run("start", "nobody").returncode == 3
    assert run("add", "frank", "--password-stdin", stdin=f"{PASSWORD}\n").returncode == 0
    again = run("add", "frank", "--password-stdin", stdin=f"{PASSWORD}\n")
    assert again.returncode == 4
    assert "frank exists" in again.stderr
    assert run("add", "grace", "--app", "nonsense", "--password-stdin", stdin=f"{PASSWORD}\n").returncode == 2
    assert run("start", "grace").returncode == 3
    run("remove", "--yes", "frank")


def test_logs_can_be_followed(site, run):
    assert run("add", "heidi", "--password-stdin", stdin=f"{PASSWORD}\n").returncode == 0
    assert run("start", "heidi").returncode == 0
    follower = subprocess.Popen(
        [sys.executable, "-m", "dispatcher", "logs", "-f", "heidi"],
        env={**os.environ, "DISPATCHER_CONFIG": str(site.config)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        cookie = None
        site.start("proxy")
        cookie = site.login("heidi")
        site.app(cookie, "/say?word=hello-there")
        for line in follower.stdout:
            if "hello-there" in line:
                break
        else:
            pytest.fail("the line never came")
    finally:
        follower.terminate()
        follower.wait()
        follower.stdout.close()
    assert "hello-there" in run("logs", "heidi", "-n", "5").stdout
    sessions = json.loads(run("sessions", "list", "--json", "--user", "heidi").stdout)["sessions"]
    assert len(sessions) == 1
    assert run("sessions", "revoke", sessions[0]["id"]).stdout == "1 session ended\n"
    assert site.web("GET", "/", Cookie=cookie).status == 401
    assert run("remove", "--yes", "heidi").returncode == 0


def test_kept_data_is_listed_and_purged(site, run):
    assert run("add", "ivan", "--password-stdin", stdin=f"{PASSWORD}\n").returncode == 0
    assert run("start", "ivan").returncode == 0
    assert run("purge", "ivan").stdout == "no data is kept of ivan\n"
    assert "dispatcher purge ivan" in run("remove", "--keep-data", "--yes", "ivan").stdout
    shown = run("info", "ivan").stdout
    assert "absent" in shown
    assert "in subprocess, kept since" in shown
    done = run("purge", "--yes", "ivan")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 copy deleted"), done.stderr
    assert run("info", "ivan").returncode == 3
    assert run("purge", "ivan").returncode == 3


def test_doctor_and_checks_with_a_manager(site, run):
    findings = json.loads(run("doctor", "--json").stdout)["findings"]
    assert any(finding["what"].startswith("the manager answers at unix://") for finding in findings)
    assert [finding for finding in findings if finding["level"] == "error"] == []
    assert "subprocess" in run("providers", "list").stdout
    assert run("providers", "check", "subprocess", "--app", "web").returncode == 0
    assert run("config", "check").returncode == 0
