"""The provider `subprocess` passes the conformance kit: sandboxed, and without bubblewrap.

As root every agent has a user of its own.  `test_subprocess_user.py` runs this file again as an ordinary user.
"""

import contextlib
import os
import sys
from pathlib import Path

import pytest
from dispatcher_subprocess.provider import SubprocessProvider

from dispatcher.testing import PROBE, ProviderContract

ROOT = os.geteuid() == 0


class SubprocessContract(ProviderContract):
    no_backend = "processes of this machine"
    bubblewrap = "always"

    @pytest.fixture
    def provider(self, context):
        options = SubprocessProvider.Options(bubblewrap=self.bubblewrap)
        provider = SubprocessProvider(context=context, options=options)
        yield provider
        provider.close()

    def app_options(self):
        command = [sys.executable, str(PROBE), "--unix", "{socket}", "{data}"]
        return {"command": command, "read_only": [str(PROBE.parent)]}

    def missing_options(self):
        return {"command": ["/nonexistent/app", "{socket}"]}

    def leftovers(self, context):
        """Control groups, journals, and processes that hold a journal or work on an agent's data."""
        mark = f"{context.state_dir.parent}/"
        found = {
            f"{where}/{name}"
            for where, names, _ in os.walk("/sys/fs/cgroup")
            for name in names
            if name.startswith(f"dispatcher-{context.installation}-")
        }
        found |= {str(path) for path in context.state_dir.glob("*.agent")}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "environ").read_bytes().decode(errors="replace")
                words += "".join(os.readlink(fd) for fd in (process / "fd").iterdir())
            except OSError:
                continue
            if mark in words and int(process.name) != os.getpid():
                found.add(f"process {process.name}")
        return found

    def inspect(self, handle, context):
        """Return the command line and the environment of every process that this user may read, as `ps` shows them."""
        found = []
        for path in (*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")):
            with contextlib.suppress(OSError):
                found.append(path.read_bytes().decode(errors="replace"))
        return "\n".join(found)


@pytest.mark.bubblewrap
class TestSandboxed(SubprocessContract):
    if not ROOT:
        unpromised = {"uid": "as the user that runs the manager"}


class TestUnconfined(SubprocessContract):
    bubblewrap = "never"
    unpromised = {
        "network": "network",
        "sockets": "without a sandbox",
        "files": "They see the host's files",
        "processes": "processes",
        **(
            {}
            if ROOT
            else {
                "uid": "as the user that runs the manager",
                "endpoint": "can read each other's data",
                "capabilities": "without a sandbox",
            }
        ),
    }

    def app_options(self):
        """An agent with variables for the loader starts from a shell of its own, which cannot enter root's home."""
        options = super().app_options()
        return options | {"command": ["/usr/bin/python3", *options["command"][1:]]} if ROOT else options
