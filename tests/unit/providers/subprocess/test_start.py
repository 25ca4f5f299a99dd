"""Limits of an agent's process when the hard limit is lower than what its app asks for."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from dispatcher_subprocess import start

from dispatcher.plugin import Deadline
from dispatcher.plugin.errors import ProviderError

CAP_SYS_RESOURCE = 24  # linux/capability.h

# Limits a child of its own that may not raise a hard limit: as an ordinary user, or as a root that is not privileged.
CHILD = """
import json, resource, subprocess, sys
from dispatcher_subprocess import start
hard, wanted = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
start.limit(child.pid, {resource.RLIMIT_NOFILE: wanted, resource.RLIMIT_CORE: None}, 0)
print(json.dumps(resource.prlimit(child.pid, resource.RLIMIT_NOFILE)))
child.communicate()
"""


def limited(prefix, hard, wanted):
    done = subprocess.run(
        [*prefix, sys.executable, "-c", CHILD, str(hard), str(wanted)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def unprivileged():
    """How a command is run without the right to raise a hard limit, whoever runs the tests."""
    return ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"] if os.geteuid() == 0 else []


def test_an_agent_gets_the_hard_limit_where_its_app_asks_for_more(unprivileged):
    assert limited(unprivileged, 256, 8192) == [256, 256]


def test_an_agent_gets_what_its_app_asks_for_where_that_is_less(unprivileged):
    assert limited(unprivileged, 256, 128) == [128, 128]


@pytest.mark.root
def test_only_a_privileged_root_raises_the_hard_limit():
    status = Path("/proc/self/status").read_text(encoding="ascii")
    may = int(re.search(r"^CapEff:\s*(\w+)", status, re.MULTILINE)[1], 16) >> CAP_SYS_RESOURCE & 1
    assert limited([], 256, 512) == ([512, 512] if may else [256, 256])


def test_a_limit_the_kernel_refuses_is_told_with_a_remedy(monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(resource, "prlimit", lambda *args: refuse() if len(args) > 2 else (9000, 9000))
    with pytest.raises(ProviderError) as caught:
        start.limit(os.getpid(), {resource.RLIMIT_NOFILE: 8192}, 0)
    assert str(caught.value) == (
        "Cannot limit the agent: Operation not permitted"
        " (give the manager CAP_SYS_RESOURCE and CAP_SYS_NICE (a container: --cap-add))"
    )


def test_what_a_leftover_process_puts_in_place_of_the_socket_until_it_is_killed_is_removed(tmp_path):
    """The health check would take a link for an attack, and the start would fail."""

    def create(_):
        raise OSError(1, "this test needs no group")

    group = SimpleNamespace(kill=lambda: (tmp_path / "s").symlink_to("/etc/passwd"), create=create)
    one = start.Start(
        spec=SimpleNamespace(
            backend_name="d-alice", run_dir=tmp_path, app=SimpleNamespace(limits=None), secrets={}
        ),
        plan=None,
        host=SimpleNamespace(cgroups=SimpleNamespace(group=lambda _: group)),
        options=None,
        journals=None,
        secret_files=None,
        attach=None,
        deadline=Deadline(5),
    )
    with pytest.raises(ProviderError, match="control group"):
        one.prepare()
    assert list(tmp_path.iterdir()) == []
