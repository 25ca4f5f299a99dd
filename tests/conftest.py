"""What all tests share: the prerequisites behind the markers, and how the run is spread over workers.

- A test that needs root, bubblewrap, Docker, libvirt or Chromium carries that marker, and `program("NAME")` for any
  other program.  Where the thing is absent the test is skipped with the reason; with CI=true *any* skip is a failure.
- Under xdist (`--dist loadgroup`) everything that shares a heavy backend runs on one worker, one after the
  other, and begins first: tests marked docker, browser or libvirt, and all of tests/chaos.  Emulated guests take
  longest, so their tests are two groups: the conformance kit, and `machines` with all others; so does the group
  `machine`, a whole machine.  A test that restarts libvirtd (marker `libvirt_restart`) waits until no other uses it.
  The rest is spread test by test.  A test may choose a group of its own with `pytest.mark.xdist_group`.
- Helpers that tests import live in `tests/` modules: `from tests.helpers import ...`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest

CI = os.environ.get("CI") == "true"
ROOT = Path(__file__).parent.parent
#: Groups in the order of their begin: the longest first, and beside emulated guests what waits more than it computes.
HEAVY = ("machine", "libvirt", "docker", "machines", "browser", "chaos")
LIBVIRT_LOCK = Path("/tmp/dispatcher-tests-libvirt.lock")


def _answers(path: str, request: bytes = b"", expect: bytes = b"") -> str:
    """Return why the daemon behind a Unix socket cannot be used, or ""."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(path)
            if request:
                sock.sendall(request)
                if expect not in sock.recv(4096):
                    return f"{path} answers nonsense"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return ""


@functools.cache
def missing(marker: str) -> str:
    """Return why tests with this marker cannot run here, or ""."""
    if marker == "root":
        return "" if os.geteuid() == 0 else "not root"
    if marker == "bubblewrap":
        return "" if shutil.which("bwrap") else "bubblewrap is not installed"
    if marker == "docker":
        host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        if not host.startswith("unix://"):
            return ""
        ping = b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n"
        return _answers(host.removeprefix("unix://"), ping, b"200")
    if marker == "libvirt":
        if not shutil.which("qemu-system-x86_64"):
            return "QEMU is not installed"
        return _answers("/var/run/libvirt/libvirt-sock")
    if marker == "postgresql":
        from tests.support.postgresql import programs

        return "" if programs() else "PostgreSQL is not installed"
    if marker == "browser":
        return "" if shutil.which("chromium") else "chromium is not installed"
    return ""


def without(*programs: str) -> str:
    """Return which of these programs are not installed, or ""."""
    places = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in programs if not shutil.which(name, path=places)]
    return f"{', '.join(absent)} not installed" if absent else ""


@pytest.hookimpl(tryfirst=True)  # before xdist writes groups into the ids of tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give heavy tests their group and put them first; groups begin in the order of HEAVY."""

    def group(item: pytest.Item) -> str:
        named = item.get_closest_marker("xdist_group")
        if named:
            return str(named.args[0] if named.args else named.kwargs.get("name"))
        if item.get_closest_marker("libvirt") and "/tests/contract/" not in str(item.path):
            item.add_marker(pytest.mark.xdist_group("machines"))
            return "machines"
        for name in HEAVY:
            if item.get_closest_marker(name) or f"/tests/{name}/" in str(item.path):
                item.add_marker(pytest.mark.xdist_group(name))
                return name
        if "/tests/integration/test_subprocess_" in str(item.path):
            # They look at all processes of user ids that they share.
            item.add_marker(pytest.mark.xdist_group("subprocess"))
            return "subprocess"
        return ""

    def rank(item: pytest.Item) -> int:
        name = group(item)
        return HEAVY.index(name) if name in HEAVY else len(HEAVY) - (1 if name else 0)

    ranks = {item: rank(item) for item in items}
    items.sort(key=ranks.__getitem__)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip (in CI: fail) what cannot run here, with the reason."""
    for marker in item.iter_markers():
        why = without(*marker.args) if marker.name == "program" else missing(marker.name)
        if why and CI:
            pytest.fail(f"needs {marker.name}: {why}", pytrace=False)
        elif why:
            pytest.skip(f"needs {marker.name}: {why}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Let a test that restarts libvirtd run while no other test with it does, on any worker."""
    with contextlib.ExitStack() as stack:
        if item.get_closest_marker("libvirt"):
            gate, lock = (stack.enter_context(open(f"{LIBVIRT_LOCK}{name}", "w")) for name in (".gate", ""))
            # Who waits for all others to end keeps the gate, so that no other begins meanwhile.
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(lock, fcntl.LOCK_EX if item.get_closest_marker("libvirt_restart") else fcntl.LOCK_SH)
            fcntl.flock(gate, fcntl.LOCK_UN)
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """In CI a skip is a failure: a suite that quietly shrinks proves nothing."""
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and nothing may be skipped in CI: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """The same for modules that skip themselves while they are imported."""
    report = yield
    if CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, and nothing may be skipped in CI: {report.longrepr}"
    return report


@pytest.fixture
def short_tmp():
    """A directory with a short path, as the path of a Unix socket has under 108 bytes; removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
