"""Project quotas of the file system (ext4, xfs): limits and usage of the data directories on this host.

The id of an agent's project is its host user id, which is stored, unique, and not used again while data exists.
A directory with the inherit flag gives its project to what is made in it, so only data from before needs a walk.

Owners of files may change their project, so providers refuse those system calls (seccomp).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dispatcher.common.humanize import share
from dispatcher.manager.files.safe_tree import walk
from dispatcher.manager.files.space import file_system
from dispatcher.plugin.errors import Unsupported
from dispatcher.plugin.model import Finding
from dispatcher.plugin.tree_removal import DIRECTORY, Tick, opened

ACCOUNTED, ENFORCED = 1 << 4, 1 << 5  # of projects, FS_QUOTA_PDQ_* in linux/dqblk_xfs.h
BYTES_PER_FILE = 8192  # a limit of 1 GiB allows 131,072 files, twice the usual density of inodes
FEWEST_FILES = 10_000
ROOM = 2 << 20  # bytes: with less, or with less than a hundredth of the limit, data is full

_SYSCALL = 443  # quotactl_fd(2), Linux 5.14; the same on all architectures
_PROJECT = 2  # PRJQUOTA
_GET, _SET, _STATE = 0x800007, 0x800008, (ord("X") << 8) + 5
_LIMITS_VALID = 5  # QIF_LIMITS
_BLOCK = 1024
_DQBLK = struct.Struct("=8QI4x")  # struct if_dqblk
_FSXATTR = struct.Struct("=5I8s")
_GET_ATTRIBUTES, _SET_ATTRIBUTES, _INHERIT = 0x801C581F, 0x401C5820, 0x200  # FS_IOC_FS[GS]ETXATTR
#: Of a kernel or file system without project quotas, or of a container that may not use them.
_ABSENT = {errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP, errno.ESRCH, errno.EINVAL, errno.EPERM}


@dataclass(frozen=True, slots=True)
class DiskUse:
    """What the data of an agent takes; a limit of None: unlimited, or not known here."""

    used: int
    limit: int | None = None
    files: int = 0
    max_files: int | None = None

    @property
    def full(self) -> bool:
        """Whether writes fail, or soon will."""
        if self.limit is None:
            return False
        return self._crowded or self.limit - self.used < max(self.limit // 100, min(ROOM, self.limit // 8))

    def __str__(self) -> str:
        text = share(self.used, self.limit)
        return f"{text}, {self.files} of {self.max_files} files" if self._crowded else text

    @property
    def _crowded(self) -> bool:
        return self.max_files is not None and self.files >= 0.99 * self.max_files


class Kernel:
    """The system calls; all take an open directory or file.

    :raises OSError: from any method.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def state(self, fd: int) -> int:
        """Return the flags of the quotas of a file system."""
        return int(struct.unpack_from("=xxH", self._quotactl(fd, _STATE, 0, bytes(128)))[0])

    def read(self, fd: int, project: int) -> DiskUse:
        """Return what a project uses."""
        blocks, _, used, max_files, _, files, *_ = _DQBLK.unpack(
            self._quotactl(fd, _GET, project, bytes(_DQBLK.size))
        )
        return DiskUse(used, blocks * _BLOCK or None, files, max_files or None)

    def limit(self, fd: int, project: int, limit: int, files: int) -> None:
        """Set a project's limits of bytes and files; 0: unlimited."""
        blocks = -(-limit // _BLOCK)
        self._quotactl(fd, _SET, project, _DQBLK.pack(blocks, 0, 0, files, 0, 0, 0, 0, _LIMITS_VALID))

    def project(self, fd: int) -> int:
        """Return the project of a file."""
        return int(self._attributes(fd)[3])

    def assign(self, fd: int, project: int, *, inherit: bool) -> None:
        """Move a file to a project."""
        flags, extent, _, _, cow, rest = self._attributes(fd)
        flags = flags | _INHERIT if inherit else flags
        fcntl.ioctl(fd, _SET_ATTRIBUTES, _FSXATTR.pack(flags, extent, 0, project, cow, rest))

    def _attributes(self, fd: int) -> tuple[int, int, int, int, int, bytes]:
        return _FSXATTR.unpack(fcntl.ioctl(fd, _GET_ATTRIBUTES, bytes(_FSXATTR.size)))

    def _quotactl(self, fd: int, command: int, project: int, data: bytes) -> bytes:
        buffer = ctypes.create_string_buffer(data, len(data))
        command = ctypes.c_int(command << 8 | _PROJECT).value
        if self._libc.syscall(_SYSCALL, fd, command, project, buffer):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return buffer.raw


class Quotas:
    """The projects of agents' data directories.

    :param top: the directory that the data directories are in.
    """

    def __init__(
        self,
        top: Path,
        *,
        privileged: bool,
        kernel: Kernel | None = None,
        file_system: Callable[[Path], tuple[str, str, str]] = file_system,
    ) -> None:
        self._top = top
        self._privileged = privileged
        self._kernel = kernel or Kernel()
        self._file_system = file_system

    def apply(self, directory: Path, project: int, limit: int | None, tick: Tick | None = None) -> None:
        """Set the limit of a data directory and give all in it to its project; None: only count.

        :raises Unsupported: it cannot be limited.
        """
        state = self._state(directory)
        if limit is not None and (fault := self._fault(directory, state)):
            why, fix = fault
            raise Unsupported("The limit `disk` cannot be enforced", why=why, fix=f"{fix}, or remove `disk`")
        if not state & ACCOUNTED:
            return
        with opened(os.fspath(directory), DIRECTORY) as top:
            files = max(FEWEST_FILES, limit // BYTES_PER_FILE) if limit is not None else 0
            self._kernel.limit(top, project, limit or 0, files)
            if self._kernel.project(top) != project:
                self._assign(top, project, tick)

    def release(self, directory: Path, project: int) -> None:
        """Take a tree out of its project: a copy is not counted."""
        if self._state(directory) & ACCOUNTED:
            with opened(os.fspath(directory), DIRECTORY) as top:
                if self._kernel.project(top) == project:
                    self._assign(top, 0, None)

    def forget(self, project: int) -> None:
        """Remove a project's limits, its data being deleted."""
        if self._state(self._top) & ACCOUNTED:
            with opened(os.fspath(self._top), DIRECTORY) as top:
                self._kernel.limit(top, project, 0, 0)

    def usage(self, directory: Path, project: int) -> DiskUse | None:
        """Return what a data directory takes; None where nothing is counted."""
        if not self._privileged:
            return None
        try:
            with opened(os.fspath(directory), DIRECTORY) as top:
                return self._kernel.read(top, project) if self._kernel.project(top) == project else None
        except OSError:
            return None

    def finding(self, *, wanted: bool) -> Finding:
        """Return whether data can be limited here.

        :param wanted: an app has a limit.
        """
        fault = self._fault(self._top, self._state(self._top))
        if fault is None:
            return Finding.ok("The limit disk is enforced by a project quota on each agent's data")
        what = f"The limit disk cannot be enforced, an app that has it does not start: {fault[0]}"
        return Finding.error(what, fault[1]) if wanted else Finding.info(what, fault[1])

    @property
    def enforced(self) -> bool:
        """Whether the file system of the agents enforces limits."""
        return self._fault(self._top, self._state(self._top)) is None

    def _state(self, directory: Path) -> int:
        if not self._privileged:
            return 0
        try:
            with opened(os.fspath(directory), DIRECTORY) as fd:
                state = self._kernel.state(fd)
                if state & ACCOUNTED:
                    self._kernel.read(fd, 0)
                return state
        except OSError as error:
            if error.errno in _ABSENT:
                return 0
            raise

    def _fault(self, directory: Path, state: int) -> tuple[str, str] | None:
        """Return why limits are not enforced, and what to do."""
        if state & ENFORCED:
            return None
        if not self._privileged:
            return "the manager does not run as root", "run it as root"
        kind, device, _ = self._file_system(directory)
        why = f"the file system of {directory} ({kind} on {device}) has no project quotas that the manager may use"
        if kind == "xfs":
            return why, "mount it with the option prjquota (/ by the kernel's parameter rootflags=prjquota)"
        if kind != "ext4":
            return why, "put manager.state_dir on ext4 or xfs with project quotas"
        if state & ACCOUNTED:
            why = f"the project quotas of {directory} ({kind} on {device}) are counted, not enforced"
            return why, "mount it with the option prjquota"
        return why, f"unmount it, run `tune2fs -O project,quota {device}`, and mount it with the option prjquota"

    def _assign(self, top: int, project: int, tick: Tick | None) -> None:
        """Give a tree to a project, its top last: what is interrupted begins again."""
        own = os.fstat(top)
        for _, name, folder, found in walk(top):
            if tick:
                tick()
            kind = stat.S_IFMT(found.st_mode)
            linked = kind != stat.S_IFDIR and found.st_nlink > 1 and found.st_uid != own.st_uid
            # Other kinds of files cannot be opened for it, and take an inode at most.
            if linked or found.st_dev != own.st_dev or kind not in {stat.S_IFREG, stat.S_IFDIR}:
                continue
            try:
                with opened(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, folder) as fd:
                    if os.path.samestat(os.fstat(fd), found):
                        self._kernel.assign(fd, project, inherit=kind == stat.S_IFDIR)
            except FileNotFoundError:
                continue
        self._kernel.assign(top, project, inherit=True)
