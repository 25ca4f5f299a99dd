"""The Debian package of this source, built once for a run of the tests and for each release."""

from __future__ import annotations

import atexit
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.conftest import ROOT

HOME = "usr/lib/agent-dispatcher"


def package(suite: str = "") -> Path:
    """Return the package's file, built once; $DISPATCHER_TEST_PACKAGE names one that exists.

    :param suite: the release of Debian or Ubuntu that it is for; by default that of this machine.
    """
    if ready := os.environ.get("DISPATCHER_TEST_PACKAGE"):
        return Path(ready)
    return _built(suite or platform.freedesktop_os_release()["VERSION_CODENAME"])


@functools.cache
def _built(suite: str) -> Path:
    directory = tempfile.mkdtemp(prefix="package-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    command = [ROOT / "tests/machine/build-package", suite, directory]
    built = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=800)
    assert built.returncode == 0, built.stdout + built.stderr
    return Path(built.stdout.splitlines()[-1])


def newer(file: Path, target: Path) -> Path:
    """Write a package of a later version, with the same contents, without compression."""
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["dpkg-deb", "--raw-extract", file, f"{work}/tree"], check=True)
        control = Path(work, "tree/DEBIAN/control")
        control.write_text(control.read_text().replace("\nVersion: ", "\nVersion: 1:"))
        subprocess.run(["dpkg-deb", "--build", "-Znone", f"{work}/tree", target], check=True, capture_output=True)
    return target
