"""The file system of the agents' sockets: files beside a socket must not fill the host's /run.

Where RUN_DIR lies in memory (a tmpfs, as /run is), a manager that runs as root mounts one small tmpfs for all
endpoint directories, `RUN_DIR/a`.  Agents cannot use more memory there than that file system holds.  Where the
kernel keeps quotas on tmpfs (Linux 6.6, CONFIG_TMPFS_QUOTA), each agent, having a user id of its own, gets a small
share of it; elsewhere one agent can still fill it and keep others from starting, which `finding` reports.

The mount outlives the manager as the agents do, and the next manager uses it again.  It is made, through
util-linux, in the mount namespace of the machine, where the proxy and the container engine see it
(docs/adr/0009).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from dispatcher.common.log import logger
from dispatcher.manager.files.space import file_system
from dispatcher.plugin.errors import ProviderError
from dispatcher.plugin.model import Finding, Level

SIZE = 16 << 20  # bytes for all agents; a socket takes none
FILES = 65536  # for all agents: each has two, its directory and its socket
SHARE_BYTES = 256 << 10  # for one user id, where there are quotas
SHARE_FILES = 64
_PLAIN = f"mode=0711,nosuid,nodev,noexec,size={SIZE},nr_inodes={FILES}"
_QUOTA = f"usrquota,usrquota_block_hardlimit={SHARE_BYTES},usrquota_inode_hardlimit={SHARE_FILES}"
_IN_MEMORY = {"tmpfs", "ramfs"}
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PATIENCE = 10.0  # seconds for a mount

_log = logger("manager.endpoints")


class SocketTmpfs:
    """The directory that holds all endpoint directories, bounded where that is possible."""

    def __init__(self, directory: Path, *, privileged: bool) -> None:
        self._directory = directory
        self._privileged = privileged
        self._why = ""  # why it is not bounded, although it should be

    def open(self) -> None:
        """Mount, unless it is mounted already or need not be.  The directory exists."""
        directory = self._directory
        if not self._privileged or directory.is_mount() or file_system(directory)[0] not in _IN_MEMORY:
            return
        if next(directory.iterdir(), None) is not None:
            self._why = "it contains sockets of agents of an earlier version; it is limited from the next boot on"
            return
        if self._mount(f"{_PLAIN},{_QUOTA}"):  # a kernel without quotas refuses
            self._mount(_PLAIN)
        if not directory.is_mount():
            _log.warning(
                "the size of the agents' socket directories is not limited",
                directory=str(directory),
                why=self._why,
            )

    def close(self) -> None:
        """Unmount, when no agent is running.  The directories are made again when needed."""
        if self._privileged and self._directory.is_mount():
            why = _run("umount", str(self._directory))
            if why:
                _log.info("the agents' socket directories stay mounted", directory=str(self._directory), why=why)

    def finding(self) -> Finding:
        """Return how much an agent can write to its socket directory."""
        kind, _, options = file_system(self._directory)
        if self._directory.is_mount() and "usrquota" in options:
            what = (
                f"an agent's files beside its socket take at most {SHARE_BYTES >> 10} KiB and {SHARE_FILES} files"
            )
            return Finding(level=Level.OK, what=what)
        if self._directory.is_mount():
            return Finding(
                level=Level.INFO,
                what=f"all agents share {SIZE >> 20} MiB for their sockets: an agent that fills them "
                "does not affect the host, but prevents starts of other agents",
                fix="a kernel with quotas on tmpfs (Linux 6.6, CONFIG_TMPFS_QUOTA) limits each agent",
            )
        what = f"an agent can fill the file system of {self._directory} through the directory of its socket"
        if kind not in _IN_MEMORY:
            return Finding(level=Level.INFO, what=f"{what}, as it can through its data", fix="set manager.run_dir")
        if not self._privileged:
            return Finding(level=Level.INFO, what=what, fix="run the manager as root: it limits that directory")
        return Finding(level=Level.WARNING, what=f"{what}: {self._why or 'it could not be mounted'}")

    def full(self) -> ProviderError:
        """Return the error of a start without space left, naming the largest user of it."""
        counts = {entry.path: sum(1 for _ in os.scandir(entry.path)) for entry in os.scandir(self._directory)}
        greedy = max(counts, key=lambda path: counts[path], default="")
        owner = f", most by the user id {os.lstat(greedy).st_uid} in {greedy}" if greedy else ""
        return ProviderError(
            "There is no space for the agent's socket",
            why=f"{self._directory} is full of {sum(counts.values())} files{owner}",
            fix="stop that user's agent and delete its files there",
        )

    def _mount(self, options: str) -> str:
        """Mount and check that the mount is visible here; return why not."""
        path = str(self._directory)
        self._why = _run("mount", "-t", "tmpfs", "-o", options, "dispatcher-endpoints", path)
        if not self._why and not self._directory.is_mount():
            _run("umount", path)
            self._why = "mounts of the machine are not visible to the manager"
        return self._why


def _run(*command: str) -> str:
    """Run a command in the machine's mount namespace; return why it failed, or nothing."""
    theirs = _machine()
    if not theirs:
        return "it is unknown whether the proxy would see it"
    if os.stat("/proc/self/ns/mnt").st_ino != os.stat(theirs).st_ino:
        command = ("nsenter", f"--mount={theirs}", "--", *command)
    program = shutil.which(command[0], path=_PATH)
    if program is None:
        return f"there is no {command[0]}"
    try:
        done = subprocess.run(
            [program, *command[1:]],
            env={"PATH": _PATH, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if not done.returncode:
        return ""
    return done.stderr.decode(errors="replace").strip()[:300] or f"{command[0]} ended with {done.returncode}"


def _machine() -> str:
    """Return the path of the machine's (or the container's) own mount namespace; empty when it may not be seen."""
    for pid in (1, 2):
        with suppress(OSError):
            path = f"/proc/{pid}/ns/mnt"
            os.stat(path)
            if pid == 1 or Path(f"/proc/{pid}/comm").read_text() == "kthreadd\n":
                return path
    return ""
