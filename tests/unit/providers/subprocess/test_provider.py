"""Where an agent's secrets are."""

import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from dispatcher_subprocess import host, network
from dispatcher_subprocess.options import AppOptions
from dispatcher_subprocess.provider import SubprocessProvider

from dispatcher.plugin import App, Deadline, DeadlineExceeded, ProviderContext, Unavailable, no_progress


@pytest.fixture
def memory():
    path = Path(tempfile.mkdtemp(prefix="run-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("privileged", [False, True])
def test_an_ordinary_users_secrets_are_where_logind_removes_nothing(memory, tmp_path, privileged):
    """It empties /dev/shm of what a user has there at the end of the last login session; root is spared."""
    provider = SubprocessProvider(
        context=ProviderContext(
            installation="7e570001", state_dir=tmp_path, run_dir=memory, proxy_gid=0, privileged=privileged
        ),
        options=SubprocessProvider.Options(),
    )
    place = provider._secret_files.path("alice").parent.parent
    assert place == (Path("/dev/shm") if privileged else memory)


class Passing:
    """The records of three agents, and a log collector that notes what it gets."""

    def __init__(self, provider, monkeypatch):
        self.records = [
            SimpleNamespace(agent=name, log_dir=f"/log/{name}", helper=True, init=name) for name in "abc"
        ]
        self.passed = []
        self.late = {"b"}
        self.restarts = []
        parts = SimpleNamespace(
            host=None, stopper=SimpleNamespace(run=lambda _: SimpleNamespace(output=lambda: os.dup(0)))
        )
        monkeypatch.setattr(type(provider), "_parts", parts)
        monkeypatch.setattr(network, "name_sockets", self.name_sockets)
        monkeypatch.setattr(provider, "_running", lambda: iter(self.records))
        monkeypatch.setattr(provider, "_watch_collector", lambda: None)
        provider._collector = SimpleNamespace(attach=self.attach, ensure=lambda: False)

    def name_sockets(self, _host, init, _deadline):
        if init in self.late:
            raise DeadlineExceeded("late")
        return os.dup(0), os.dup(0)

    def attach(self, fds, path):
        self.passed.append((path.parent.name, len(fds)))
        return bool(self.restarts) and self.restarts.pop(0)


@pytest.fixture
def provider(memory, tmp_path):
    return SubprocessProvider(
        context=ProviderContext(
            installation="7e570001", state_dir=tmp_path, run_dir=memory, proxy_gid=0, privileged=False
        ),
        options=SubprocessProvider.Options(),
    )


def test_one_agent_that_fails_keeps_no_other_from_its_log_and_is_repeated(provider, monkeypatch):
    passing = Passing(provider, monkeypatch)
    provider._attach_all(passing.records, new=True)
    assert passing.passed == [("a", 3), ("b", 1), ("c", 3)]
    passing.late.clear()
    passing.passed.clear()
    provider._keep_collecting()
    assert passing.passed == [("a", 3), ("b", 3), ("c", 3)]
    passing.passed.clear()
    provider._keep_collecting()
    assert passing.passed == []


def test_a_collector_that_starts_anew_meanwhile_gets_everything(provider, monkeypatch):
    passing = Passing(provider, monkeypatch)
    passing.late.clear()
    passing.restarts = [False, True]
    provider._attach_all(passing.records, new=False)
    assert passing.passed == [("a", 1), ("b", 1), ("a", 3), ("b", 3), ("c", 3)]
    passing.passed.clear()
    provider._keep_collecting()
    assert passing.passed == []


def test_a_start_tries_bubblewrap_again_after_a_shortage(monkeypatch, tmp_path):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: Cannot allocate memory' >&2; exit 1\n")
    bwrap.chmod(0o755)
    find = host.find_program
    monkeypatch.setattr(host, "find_program", lambda name: str(bwrap) if name == "bwrap" else find(name))
    context = ProviderContext(
        installation="7e570001", state_dir=tmp_path, run_dir=tmp_path, proxy_gid=0, privileged=os.geteuid() == 0
    )
    provider = SubprocessProvider(context=context, options=SubprocessProvider.Options(cgroups="never"))
    app = App(name="a", provider="subprocess", options=AppOptions(command=["/bin/true", "{socket}"]))
    with pytest.raises(Unavailable, match="could not be tried"):
        provider.prepare(app, deadline=Deadline(10), progress=no_progress)
    bwrap.write_text("#!/bin/sh\n")
    provider.prepare(app, deadline=Deadline(10), progress=no_progress)
