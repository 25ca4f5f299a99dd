"""Secrets as files in memory, for containers to see read-only.  Touches a directory on a tmpfs.

They are not in the container's description, so `docker inspect` shows none; they are on no disk; they belong
to the agent's user alone, below a directory that only the manager can enter.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from dispatcher.plugin import BadRequest, ProviderContext, ProviderError, make_owned, owned

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_TMPFS_MAGIC = {"tmpfs", "ramfs"}


class SecretFiles:
    """The secrets of one installation's agents."""

    def __init__(self, context: ProviderContext) -> None:
        self._context = context
        self._stem = f"dispatcher-{context.installation}-secrets"
        self._lock = threading.Lock()  # directories that agents share come and go

    def _parent(self) -> Path:
        """Return a directory in memory that everybody may write to, or only this user.

        :raises ProviderError: no directory of this host is in memory.
        """
        candidates = [self._context.run_dir, Path(f"/run/user/{os.geteuid()}"), Path("/dev/shm")]  # noqa: S108
        mounts = _mounts()
        for base in candidates:
            if base.is_dir() and os.access(base, os.W_OK) and _kind(base, mounts) in _TMPFS_MAGIC:
                return base
        raise ProviderError(
            "Secrets cannot be kept in memory",
            why="neither the run directory nor /dev/shm is on a tmpfs",
            fix="mount a tmpfs at manager.run_dir",
        )

    def write(self, name: str, values: Mapping[str, str], owner: int) -> Path:
        """Write the secrets of an agent, replacing what was there; return the directory.

        :param owner: host user id whose the files are.
        """
        for key in values:
            if not _NAME.fullmatch(key):
                raise BadRequest(f"Bad name of a secret {key!r}", fix="use letters, digits and . _ -")
        self.remove(name)
        with self._lock:
            directory = make_owned(self._parent(), self._stem, 0o700) / name
            directory.mkdir(mode=0o700)
        for key, value in values.items():
            descriptor = os.open(directory / key, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400)
            with os.fdopen(descriptor, "wb") as file:
                file.write(value.encode())
                if self._context.privileged:
                    os.fchown(file.fileno(), owner, -1)
        directory.chmod(0o500)
        if self._context.privileged:
            os.chown(directory, owner, -1)
        return directory

    def remove(self, name: str) -> None:
        """Remove the secrets of an agent; none is success."""
        try:
            parent = self._parent()
        except ProviderError:
            return
        with self._lock:
            for base in owned(parent, self._stem):
                directory = base / name
                if not os.path.lexists(directory):
                    continue
                if not self._context.privileged:
                    directory.chmod(0o700)
                shutil.rmtree(directory)
                with contextlib.suppress(OSError):  # others have theirs in it
                    base.rmdir()


def _mounts() -> list[tuple[str, str]]:
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    fields = [line.split(" ") for line in lines]
    return [(one[1].replace("\\040", " "), one[2]) for one in fields if len(one) > 2]


def _kind(path: Path, mounts: list[tuple[str, str]]) -> str:
    real = os.path.realpath(path)
    best, kind = "", ""
    for where, what in mounts:
        inside = real == where or real.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= len(best):
            best, kind = where, what
    return kind
