"""The provider passes the conformance kit.  Needs root, and runc or (with RUNTIME=crun) crun: `pytest test_runc.py`."""

import os
from pathlib import Path

import pytest
from dispatcher_runc.provider import RuncProvider

from dispatcher.testing import PROBE, ProviderContract

RUNTIME = os.environ.get("RUNTIME", "runc")


class TestRunc(ProviderContract):
    no_backend = "a program, no daemon"

    @pytest.fixture
    def provider(self, context):
        return RuncProvider(context=context, options=RuncProvider.Options(runtime=RUNTIME))

    def app_options(self):
        command = ["/usr/bin/python3", str(PROBE), "--unix", "{socket}", "{data}"]
        return {"command": command, "read_only": [str(PROBE.parent)]}

    def missing_options(self):
        return {"command": ["/no/such/program"]}

    def leftovers(self, context):
        """Control groups of containers, and directories of secrets."""
        places = (*Path("/sys/fs/cgroup").glob("*"), Path("/sys/fs/cgroup"), Path("/dev/shm"))
        return {str(path) for place in places for path in place.glob(f"dispatcher-{context.installation}-*")}

    def inspect(self, handle, context):
        """Return the bundle and what the runtime keeps; the kit itself looks at all processes."""
        places = context.state_dir / handle.name, context.run_dir / "containers"
        files = [path for place in places for path in place.rglob("*.json")]
        assert files
        return "".join(path.read_text() for path in files)
