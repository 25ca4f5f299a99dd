"""Deletes directory trees that an attacker may write to, of any depth and size.

An agent may change its files while root deletes them.  So no path inside a tree is opened: each step goes from an
open directory to one name in it, with ``O_NOFOLLOW``, and has no effect outside of the tree, even if that name was
replaced.  At most three descriptors are open at a time, and nothing is recursive, as `shutil.rmtree` is.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DeadlineExceeded, DispatcherError, ProviderError

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
DELETING = 3600.0  # seconds that the deletion of one tree may take
_EMPTYING = 60.0  # seconds to remove temporary files at a start; at most half of its remaining time
_AT_A_TIME = 10_000  # names read of a directory, so that a huge one does not fill the memory
_SHOWN = 3  # of what remains

_log = logging.getLogger("dispatcher.plugin")

Tick = Callable[[], None]


@contextmanager
def opened(name: str | bytes, flags: int, dir_fd: int | None = None) -> Iterator[int]:
    """Yield a descriptor, closed at the end of the block."""
    fd = os.open(name, flags, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def remove_tree(
    path: str | os.PathLike[str],
    *,
    deadline: Deadline | None = None,
    tick: Tick | None = None,
    dir_fd: int | None = None,
) -> None:
    """Delete the file or tree at `path`, if there is one.  Links are deleted, never followed.

    Deep trees are flattened while they are deleted: each directory's subdirectories are moved up to the top.  What
    cannot be deleted (an immutable file, a mount) keeps nothing else from being deleted.

    :param deadline: by default an hour from now; :param dir_fd: the directory in which a relative path begins.
    :raises ProviderError: something remains; the error names it.
    :raises DeadlineExceeded: a process keeps filling the tree.
    """
    parent, name = os.path.split(os.fspath(path))
    remaining: dict[str, OSError] = {}
    try:
        with opened(parent or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd) as folder:
            top = _enter(name, folder)
            if top is None:
                os.unlink(name, dir_fd=folder)
                return
            try:
                flattening = _Flattening(top, deadline or Deadline(DELETING), tick, remaining)
                flattening.run()
                while not remaining and not _remove_directory(name, folder):
                    flattening.check()
                    flattening.run()
                    if not remaining and not _is_same(top, name, folder):
                        remaining[name] = OSError(errno.EBUSY, "another was put in its place")
            finally:
                os.close(top)
    except FileNotFoundError:
        return
    except OSError as error:
        remaining[name] = error
    if remaining:
        shown = "; ".join(f"{left!r}: {error.strerror}" for left, error in list(remaining.items())[:_SHOWN])
        raise ProviderError(
            f"{len(remaining)} {'entry' if len(remaining) == 1 else 'entries'} of {path} cannot be deleted",
            why=shown,
            fix="remove what protects it (`chattr -R -i -a`, a mount), then repeat",
        )


def make_temporary(path: Path, uid: int, gid: int, deadline: Deadline) -> None:
    """Recreate the directory for temporary files in the data of an agent that does not run.

    The agent can have put anything there.  Failures are logged only: the agent starts with the remaining files,
    the next start continues the removal, and without the directory programs use `/tmp`.
    """
    time = min(_EMPTYING, deadline.remaining() / 2)
    try:
        with opened(os.fspath(path.parent), DIRECTORY) as parent:
            remove_tree(path.name, dir_fd=parent, deadline=Deadline(time))
            os.mkdir(path.name, 0o700, dir_fd=parent)
            with opened(path.name, DIRECTORY, parent) as directory:
                if os.geteuid() == 0:
                    os.fchown(directory, uid, gid)
    except DeadlineExceeded:
        _log.warning("%s: not all temporary files could be removed within %.0f s of the start", path, time)
    except (OSError, DispatcherError) as error:
        _log.warning("%s: the directory for temporary files cannot be recreated: %s", path, error)


class _Flattening:
    """The deletion of everything below an open directory.

    :ivar remaining: the names of what cannot be deleted, and why.
    """

    def __init__(self, top: int, deadline: Deadline, tick: Tick | None, remaining: dict[str, OSError]) -> None:
        self._top = top
        self._deadline = deadline
        self._tick = tick
        self._remaining = remaining
        self._prefix = secrets.token_hex(8)
        self._moved = 0

    def run(self) -> None:
        """Delete.

        :raises DeadlineExceeded: it takes too long.
        """
        stuck: set[str] = set()  # what holds something that remains
        _make_writable(self._top)
        while names := _names(self._top, stuck):
            for name in names:
                self.check()
                if not self._delete(name):
                    stuck.add(name)

    def check(self) -> None:
        """Call the tick.

        :raises DeadlineExceeded: it takes too long.
        """
        if self._deadline.expired:
            raise DeadlineExceeded("A directory cannot be deleted in time", why="a process keeps writing to it")
        if self._tick:
            self._tick()

    def _delete(self, name: str) -> bool:
        """Delete what is in a directory, then itself; return whether nothing remains that cannot be deleted."""
        try:
            below = _enter(name, self._top)
            if below is None:
                _unlink(name, self._top)
                return True
        except FileNotFoundError:
            return True
        except OSError as error:
            self._remaining[name] = error
            return False
        stuck: set[str] = set()
        try:
            _make_writable(below)
            while inner := _names(below, stuck):
                self.check()
                for item in inner:
                    try:
                        if not _unlink(item, below):
                            self._moved += 1
                            _move_up(item, below, f"{self._prefix}-{self._moved}", self._top)
                    except OSError as error:
                        self._remaining[item] = error
                        stuck.add(item)
        finally:
            os.close(below)
        if stuck:
            return False
        try:
            _remove_directory(name, self._top)  # if it was filled again, the next round takes it
        except OSError as error:
            self._remaining[name] = error
            return False
        return True


def _names(folder: int, without: set[str]) -> list[str]:
    """Return names in a directory, a bounded number."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name not in without:
                found.append(entry.name)
            if len(found) >= _AT_A_TIME:
                break
    return found


def _enter(name: str, folder: int) -> int | None:
    """Open a directory, readable for its owner; None if it is not a directory."""
    for _ in range(3):
        try:
            return os.open(name, DIRECTORY, dir_fd=folder)
        except NotADirectoryError:
            return None
        except PermissionError:
            with opened(name, PATH | os.O_DIRECTORY, folder) as fd:
                os.chmod(f"/proc/self/fd/{fd}", 0o700)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)


def _remove_directory(name: str, folder: int) -> bool:
    """Delete an empty directory; False if it was filled again, or replaced by something else."""
    try:
        os.rmdir(name, dir_fd=folder)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.ENOTDIR}:
            return False
        raise
    return True


def _is_same(fd: int, name: str, folder: int) -> bool:
    """Whether a name is that of an open directory, or of nothing."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return True


def _make_writable(folder: int) -> None:
    try:
        os.fchmod(folder, 0o700)
    except PermissionError:
        pass  # an immutable directory: deleting from it says so


def _unlink(name: str, folder: int) -> bool:
    """Delete a file that is not a directory; return whether it is gone."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return True
    except (IsADirectoryError, PermissionError):
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode):
            raise
        return False
    return True


def _move_up(name: str, folder: int, target: str, top: int) -> None:
    try:
        os.rename(name, target, src_dir_fd=folder, dst_dir_fd=top)
    except PermissionError:  # not root: a directory that is moved must be writable
        with opened(name, PATH | os.O_DIRECTORY, folder) as fd:
            os.chmod(f"/proc/self/fd/{fd}", 0o700)
        os.rename(name, target, src_dir_fd=folder, dst_dir_fd=top)
    except FileNotFoundError:
        pass
