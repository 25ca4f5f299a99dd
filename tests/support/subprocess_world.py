"""A small world for the tests of the provider `subprocess`: an installation in a directory, agents, hard looks."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from dispatcher_subprocess.provider import SubprocessProvider

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.model import AgentSpec, App
from dispatcher.plugin.provider import ProviderContext, no_progress
from dispatcher.testing import PROBE, Inside
from dispatcher.testing.kit import processes_of

#: An interpreter that starts fast and that everybody may run.
PYTHON = os.path.realpath("/usr/bin/python3")
PROBE_COMMAND = [PYTHON, "-S", str(PROBE), "--unix", "{socket}"]
ROOT = os.geteuid() == 0


class World:
    """One installation.  `close` ends all that it started and removes its directory."""

    def __init__(self, installation="7e570001", base=None, **options):
        self.installation = installation
        self.base = Path(base or tempfile.mkdtemp(prefix="sw-", dir="/tmp"))
        self.base.chmod(0o711)
        self.options = options
        self.providers = []
        self.first_uid = 1_300_000 + int(installation, 16) % 1000 * 100
        self.known = []

    def context(self):
        return ProviderContext(
            installation=self.installation,
            state_dir=self.base / "state/providers/subprocess",
            run_dir=self.base / "run/p/subprocess",
            proxy_gid=os.getegid(),
            privileged=ROOT,
        )

    def provider(self, **options):
        made = SubprocessProvider(
            context=self.context(), options=SubprocessProvider.Options(**(self.options | options))
        )
        self.providers.append(made)
        return made

    def uid(self, agent):
        if agent not in self.known:
            self.known.append(agent)
        return self.first_uid + self.known.index(agent) if ROOT else os.geteuid()

    def spec(self, agent="alice", command=None, options=None, secrets=None, stdin=None, **app):
        uid = self.uid(agent)
        gid = uid if ROOT else os.getegid()
        home, run = self.base / "state/agents" / agent, self.base / "run/a" / agent
        chosen = {"command": command or PROBE_COMMAND, "read_only": [str(PROBE.parent)]} | (options or {})
        spec = AgentSpec(
            installation=self.installation,
            agent=agent,
            user=agent,
            app=App(
                name="demo",
                provider="subprocess",
                options=SubprocessProvider.AppOptions.model_validate(chosen),
                **app,
            ),
            uid=uid,
            gid=gid,
            proxy_gid=os.getegid(),
            data_dir=home / "data",
            run_dir=run,
            log_dir=home / "log",
            secrets=secrets or {},
            stdin=stdin,
        )
        for directory, mode, owner in ((spec.data_dir, 0o700, uid), (spec.log_dir, 0o700, -1), (run, 0o2710, uid)):
            directory.mkdir(parents=True, exist_ok=True)
            if ROOT and owner >= 0:
                os.chown(directory, owner, os.getegid() if directory == run else gid)
            directory.chmod(mode)
        for parent in (
            self.base / "state",
            self.base / "state/agents",
            home,
            self.base / "run",
            self.base / "run/a",
        ):
            parent.chmod(0o711)
        return spec

    def start(self, provider, spec, ready=True):
        handle = provider.ensure(spec, deadline=Deadline(20), progress=no_progress)
        return handle, self.inside(provider, handle) if ready else None

    def inside(self, provider, handle, seconds=15):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            seen = provider.observe(handle, deadline=Deadline(5))
            if seen.endpoint:
                inside = Inside(seen.endpoint, seen.owner_uid)
                if inside.answers():
                    return inside
            if seen.state.value in {"stopped", "absent"}:
                break
            time.sleep(0.01)
        raise AssertionError(f"{seen}; {lines(provider, handle)}")

    def close(self):
        """End all agents, whatever became of the journals, and remove the directory."""
        for provider in [*self.providers, self.provider()]:
            with contextlib.suppress(DispatcherError):
                for handle, _ in provider.list(deadline=Deadline(10)):
                    destroy(provider, handle)
            provider.close()
        left = []
        if ROOT:
            left = [pid for number in range(len(self.known)) for pid in processes_of(self.first_uid + number)]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        shutil.rmtree(self.base, ignore_errors=True)
        assert not left, f"agents' processes were left: {left}"


def stop(provider, handle, grace=5.0):
    provider.stop(handle, grace=grace, deadline=Deadline(30), progress=no_progress)


def destroy(provider, handle):
    provider.destroy(handle, data=True, deadline=Deadline(30), progress=no_progress)


def observe(provider, handle):
    return provider.observe(handle, deadline=Deadline(10))


def lines(provider, handle, tail=50):
    return list(provider.logs(handle, tail=tail, follow=False, deadline=Deadline(5)))


def eventually(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)
    return found


def listener(address=("127.0.0.1", 0)):
    return socket.create_server(address)


def status(pid):
    """The fields of /proc/PID/status, as the host sees them."""
    text = Path(f"/proc/{pid}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def shell(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout
