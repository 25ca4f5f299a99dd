"""Checks of `doctor` on the machine: the clock, limits of the kernel."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

from dispatcher.plugin.model import Finding

RELEASED = 1_764_000_000  # Unix time before this release: a clock that shows less is wrong
WANTED_FILES = 4096
AGENT_FILES = 4096 * 8192  # that one agent may open with the defaults: processes, files of each


def clock() -> Iterator[Finding]:
    """Check that the clock is not obviously wrong: certificates and sessions depend on it."""
    if time.time() < RELEASED:
        yield Finding.error(
            f"the clock shows {time.strftime('%Y-%m-%d')}, a day in the past", "set the clock (timedatectl)"
        )
    else:
        yield Finding.ok(f"the clock shows {time.strftime('%Y-%m-%d %H:%M %Z')}")


def open_files() -> Iterator[Finding]:
    """Check the limit of open files: each connection takes two."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < WANTED_FILES:
        yield Finding.warning(
            f"at most {hard} open files",
            f"allow {WANTED_FILES} or more: LimitNOFILE= in the unit; for a shell, a line with nofile in "
            "/etc/security/limits.conf, then sign in again",
        )
    else:
        shown = "any number of" if hard == resource.RLIM_INFINITY else str(hard)
        yield Finding.ok(f"up to {shown} open files")


def file_table(settings: Path = Path("/proc/sys")) -> Iterator[Finding]:
    """Check that one agent cannot open all files that the kernel allows for the host and all agents."""
    most = int((settings / "fs/file-max").read_text(encoding="ascii"))
    if most < AGENT_FILES:
        yield Finding.warning(
            f"the host allows {most} open files in all (fs.file-max); one agent may open {AGENT_FILES} with the "
            "defaults, as far as its memory suffices, and then no other program opens any",
            "set fs.file-max = 9223372036854775807 in /etc/sysctl.d, as systemd does at boot",
        )
