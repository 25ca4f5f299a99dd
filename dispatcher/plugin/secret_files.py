"""An agent's secrets as files in memory: one directory per agent, which only that agent can read.

They are never in an argument list, an environment or on a disk.  The directories lie below one of this user's own
in a place such as /dev/shm.  Every user can write there, and can take a name first with a directory or a link.  So
a directory is used only if it belongs to this user and is not a link; where the plain name is taken, one with a
random suffix is made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from dispatcher.plugin.errors import ConfigError, ProviderError
from dispatcher.plugin.names import printable
from dispatcher.plugin.tree_removal import DIRECTORY, opened, remove_tree

_log = logging.getLogger("dispatcher.plugin.secret_files")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class SecretFiles:
    """The secrets of all agents of an installation with one provider.

    :param stem: name of the directory that holds the agents' directories; unique to installation and provider.
    :param candidates: where that directory may be; the first that is in memory and writable is used.
    :param mode: of that directory; 0711 where agents reach their own by its path.
    """

    def __init__(self, stem: str, candidates: Sequence[Path], *, mode: int = 0o700) -> None:
        self._stem = stem
        self._candidates = candidates
        self._mode = mode
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        """Return the directory of an agent's secrets, whether it exists or not.

        :raises ProviderError: none of the candidates is in memory.
        """
        parent = self._parent()
        existing = [base / name for base in owned(parent, self._stem)]
        return next((path for path in existing if os.path.lexists(path)), parent / self._stem / name)

    def write(self, name: str, values: Mapping[str, str], uid: int, gid: int) -> Path:
        """Write an agent's secrets, replacing earlier ones; return their directory.

        :param uid, gid: host user and group that own the files, if this process is root.
        :raises ConfigError: a secret's name cannot be a file's; :raises ProviderError: they cannot be written.
        """
        for key in values:
            if not _NAME.fullmatch(key):
                raise ConfigError(f"Bad name of a secret {printable(key)!r}", fix="use letters, digits and . _ -")
        with self._lock:
            self._remove(name)
            owner = (uid, gid) if os.geteuid() == 0 else (-1, -1)
            base = make_owned(self._parent(), self._stem, self._mode)
            try:
                with opened(os.fspath(base), DIRECTORY) as parent:
                    os.mkdir(name, 0o700, dir_fd=parent)
                    with opened(name, DIRECTORY, parent) as directory:
                        for key, value in values.items():
                            with os.fdopen(os.open(key, _FILE, 0o400, dir_fd=directory), "wb") as file:
                                file.write(value.encode())
                                os.fchown(file.fileno(), *owner)
                        os.fchown(directory, *owner)
                        os.fchmod(directory, 0o500)
            except OSError as error:
                self._remove(name)
                raise ProviderError("Cannot write the secrets", why=error.strerror or str(error)) from error
        return base / name

    def remove(self, name: str) -> None:
        """Remove an agent's secrets; absent is success.

        :raises ProviderError: they cannot be removed.
        """
        with self._lock:
            self._remove(name)

    def _parent(self) -> Path:
        for path in self._candidates:
            if os.access(path, os.W_OK | os.X_OK) and in_memory(path):
                return path
        names = ", ".join(map(str, self._candidates))
        raise ProviderError(
            "Secrets cannot be kept in memory",
            why=f"none of {names} is a tmpfs that this user may write to",
            fix="mount a tmpfs at manager.run_dir",
        )

    def _remove(self, name: str) -> None:
        for base in [base for parent in self._candidates for base in owned(parent, self._stem)]:
            remove_tree(base / name)
            with contextlib.suppress(OSError):
                base.rmdir()  # fails while other agents have secrets


def in_memory(path: Path) -> bool:
    """Whether a directory lies on a file system that is kept in memory."""
    try:
        device = path.stat().st_dev
    except OSError:
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        if left.split(" ")[2] == wanted:
            return right.split(" ")[0] in {"tmpfs", "ramfs"}
    return False


def owned(parent: Path, stem: str) -> list[Path]:
    """Return this user's directories called `stem`, or `stem-` and a random suffix; the plain one first.

    :param parent: a directory that is sticky or belongs to this user, so that others cannot rename its entries.
    """
    candidates = [parent / stem, *sorted(parent.glob(f"{stem}-*"))]
    return [path for path in candidates if _is_own(path)]


def make_owned(parent: Path, stem: str, mode: int) -> Path:
    """Return this user's directory, and make it if there is none.

    :raises ProviderError: it cannot be made.
    """
    path = next(iter(owned(parent, stem)), None)
    try:
        if path is None:
            path = parent / stem
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                path = Path(tempfile.mkdtemp(prefix=f"{stem}-", dir=parent))
                _log.warning("another user made %s, using %s", parent / stem, path)
        if stat.S_IMODE(path.lstat().st_mode) != mode:
            path.chmod(mode)
    except OSError as error:
        raise ProviderError(f"Cannot make a directory in {parent}", why=error.strerror or str(error)) from error
    return path


def _is_own(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
