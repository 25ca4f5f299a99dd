"""The provider `subprocess` passes the conformance kit: sandboxed, and without bubblewrap.

As root every agent has a user of its own.  `test_subprocess_user.py` runs this file again as an ordinary user.
"""

import os
import subprocess
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
        return {"command": [sys.executable, str(PROBE), "--unix", "{socket}"], "read_only": [str(PROBE.parent)]}

    def missing_options(self):
        return {"command": ["/nonexistent/app", "{socket}"]}

    def leftovers(self, installation):
        found = {str(path) for path in Path("/sys/fs/cgroup").glob(f"**/dispatcher-{installation}-*")}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if f"dispatcher-{installation}".encode() in words and state != "Z":
                found.add(f"process {process.name}")
        return found

    def inspect(self, handle):
        return subprocess.run(["ps", "axeww"], capture_output=True, text=True, check=True).stdout


@pytest.mark.bubblewrap
class TestSandboxed(SubprocessContract):
    if not ROOT:
        unpromised = {"uid": "as the user that runs the manager"}


class TestUnconfined(SubprocessContract):
    bubblewrap = "never"
    unpromised = {
        "network": "not kept without a sandbox",
        "processes": "processes",
    } | ({} if ROOT else {})
