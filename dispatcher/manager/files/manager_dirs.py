"""The manager's own directories, their modes, and the lock against a second manager."""

from __future__ import annotations

import fcntl
import io
import os
import stat
from pathlib import Path

from dispatcher.common.forked import close_in_children
from dispatcher.common.log import logger
from dispatcher.config.default_paths import MANAGER_LOCK
from dispatcher.config.host_users import HostAccounts
from dispatcher.config.layout import Paths
from dispatcher.manager.files.space import disk_fix
from dispatcher.plugin.errors import ConfigError, Conflict, Unavailable

_log = logger("manager.directories")


def make_directories(paths: Paths, accounts: HostAccounts) -> None:
    """Make the manager's directories with their modes; correct modes that are too permissive.

    :raises ConfigError: a directory belongs to another user, is writable for others, or is a link.
    :raises Unavailable: the disk is full or read-only.
    """
    try:
        _own_directory(paths.run_dir, 0o755)
        _own_directory(paths.state_dir, 0o711)
        _own_directory(paths.secrets_dir, 0o700)
        paths.proxy_dir.mkdir(mode=0o700, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(paths.proxy_dir, accounts.proxy_uid, accounts.proxy_gid, follow_symlinks=False)
    except OSError as error:
        raise Unavailable(
            f"Cannot make {error.filename or paths.state_dir}",
            why=error.strerror or str(error),
            fix=f"{disk_fix(error)}, or choose manager.state_dir and manager.run_dir",
        ) from error


def _own_directory(path: Path, mode: int) -> None:
    for parent in reversed(path.parents):
        if parent.is_symlink():  # the kernel may not follow another user's (fs.protected_symlinks)
            _check_owner(parent, parent.lstat().st_uid)
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    for directory in reversed(missing):
        _check_parent(directory.parent)  # nothing is made where it is refused
        directory.mkdir(mode=mode if directory == path else 0o755, exist_ok=True)
    if not missing:
        _check_parent(path.parent)
    _check_own(path)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def _check_own(path: Path) -> None:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise ConfigError(
            f"{path} is a symbolic link",
            why="a link in place of this directory is not followed",
            fix=f"name {path.resolve()} in manager.state_dir or manager.run_dir, or mount it there",
        )
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path} is not a directory", fix="remove it, or choose another one")
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} belongs to another user",
            why=f"its owner has the user id {found.st_uid}, the manager {os.geteuid()}",
            fix="remove it, or choose another one",
        )


def _check_parent(path: Path) -> None:
    """Refuse a directory that any user could have made or can write to; warn where one other user can."""
    found = path.stat()
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise ConfigError(
            f"{path} is writable for all users", why="they could replace its contents", fix=f"chmod o-w {path}"
        )
    _check_owner(path, found.st_uid)


def _check_owner(path: Path, owner: int) -> None:
    if owner in {0, os.geteuid()}:
        return
    if path.parent.stat().st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"{path} belongs to another user",
            why=f"its owner has the user id {owner}; {path.parent} is writable for all users",
            fix="set manager.run_dir and manager.state_dir, or $XDG_RUNTIME_DIR",
        )
    _log.warning("another user could replace the contents", directory=str(path), owner=owner)


class Lock:
    """A lock held while a manager runs; the kernel releases it however the manager ends.

    :param directory: the protected one.
    :raises Conflict: a running manager holds it; :raises Unavailable: it cannot be opened.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / MANAGER_LOCK
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._file = io.FileIO(os.open(self.path, flags, 0o600), "r+")
        except OSError as error:
            raise Unavailable(f"Cannot open {self.path}", why=error.strerror or str(error)) from error
        self._descriptor = self._file.fileno()
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._read()
            self._file.close()
            raise Conflict(
                "Another manager is running",
                why=f"the process {holder or 'of an unknown id'} holds {self.path}",
                fix="stop it first, or choose another manager.run_dir and manager.state_dir",
            ) from None
        close_in_children(self._file)
        if left := self._read():
            _log.warning("the last manager did not stop cleanly", pid=left, lock=str(self.path))
        self._write(str(os.getpid()))

    def close(self) -> None:
        """Release the lock and note that this manager stopped cleanly."""
        self._write("")
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # also for a child that has just been forked
        self._file.close()

    def _read(self) -> str:
        return os.pread(self._descriptor, 20, 0).decode("ascii", "replace").strip()

    def _write(self, text: str) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)


def write_atomically(path: Path, data: bytes, mode: int) -> None:
    """Write a file atomically; at no moment has it more permissions than `mode`."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
