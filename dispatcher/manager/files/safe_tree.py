"""Directory trees that an attacker may write to: make, delete, walk and change owners safely.

An agent owns its data directory and may change it while the manager, often as root, works there.  So no function
here opens a path inside a tree: each step goes from an open directory to one name in it, with ``O_NOFOLLOW``, and
has no effect outside of the tree, even if that name was replaced.  Trees may be of any depth: at most three
descriptors are open at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DeadlineExceeded, ProviderError

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_CHARACTERS = 1 << 29  # of paths in memory at a time: some millions of files, or a very deep tree

Tick = Callable[[], None]


@contextmanager
def opened(name: str | bytes, flags: int, dir_fd: int | None = None) -> Iterator[int]:
    """Yield a descriptor, closed at the end of the block."""
    fd = os.open(name, flags, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether `path` exists, a dangling link included."""
    return os.path.lexists(path)


def make_directory(path: str | os.PathLike[str], mode: int, owner: tuple[int, int] | None = None) -> bool:
    """Make a directory, or give an existing one its mode and owner; return whether it was made.

    Its parent must be trusted.

    :raises ProviderError: it is not a directory, but a symbolic link, say.
    """
    made = False
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        try:
            os.mkdir(path, 0o700)
            made = True
        except FileExistsError:
            pass
        found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise ProviderError(f"{path} is not a directory", why="it is another kind of file", fix="move it away")
    wrong_owner = owner is not None and (found.st_uid, found.st_gid) != owner
    if wrong_owner or stat.S_IMODE(found.st_mode) != mode:
        with opened(os.fspath(path), _PATH | os.O_DIRECTORY) as fd:
            handle = f"/proc/self/fd/{fd}"
            if wrong_owner and owner is not None:
                os.chown(handle, *owner)
            os.chmod(handle, mode)
    return made


def remove_tree(path: str | os.PathLike[str], *, deadline: Deadline, tick: Tick | None = None) -> None:
    """Delete the file or tree at `path`, if there is one.  Links are deleted, never followed.

    Deep trees are flattened while they are deleted: each directory's subdirectories are moved up to the top.

    :raises DeadlineExceeded: a process keeps filling the tree.
    :raises OSError: a file cannot be deleted.
    """
    parent, name = os.path.split(os.fspath(path))
    try:
        folder = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        try:
            top = _enter(name, folder)
        except FileNotFoundError:
            return
        if top is None:
            os.unlink(name, dir_fd=folder)
            return
        try:
            os.fchmod(top, 0o700)
            _flatten(top, deadline, tick)
        finally:
            os.close(top)
        with contextlib.suppress(FileNotFoundError):  # deleted by another process
            os.rmdir(name, dir_fd=folder)
    finally:
        os.close(folder)


def _enter(name: str, folder: int) -> int | None:
    """Open a directory, readable for its owner; None if it is not a directory."""
    for _ in range(3):
        try:
            return os.open(name, DIRECTORY, dir_fd=folder)
        except NotADirectoryError:
            return None
        except PermissionError:
            with opened(name, _PATH | os.O_DIRECTORY, folder) as fd:
                os.chmod(f"/proc/self/fd/{fd}", 0o700)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise
    raise PermissionError(f"{name} cannot be opened")


def _flatten(top: int, deadline: Deadline, tick: Tick | None) -> None:
    prefix, count = secrets.token_hex(8), 0
    while names := _names(top):
        for name in names:
            if deadline.expired:
                raise DeadlineExceeded(
                    "A directory cannot be deleted in time", why="a process keeps writing to it"
                )
            if tick:
                tick()
            below = _enter_or_none(name, top)
            if below is None:
                _unlink(name, top)
                continue
            try:
                os.fchmod(below, 0o700)
                inner = _names(below)
                while inner and not deadline.expired:
                    for item in inner:
                        if not _unlink(item, below):
                            count += 1
                            _move_up(item, below, f"{prefix}-{count}", top)
                    inner = _names(below)
            finally:
                os.close(below)
            try:
                os.rmdir(name, dir_fd=top)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # filled again meanwhile: the next round takes it
                    raise


def _names(folder: int, most: int = 10000) -> list[str]:
    """Return names in a directory, a bounded number, so that a huge one does not fill the memory."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            found.append(entry.name)
            if len(found) >= most:
                break
    return found


def _enter_or_none(name: str, folder: int) -> int | None:
    try:
        return _enter(name, folder)
    except FileNotFoundError:
        return None


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
        with opened(name, _PATH | os.O_DIRECTORY, folder) as fd:
            os.chmod(f"/proc/self/fd/{fd}", 0o700)
        os.rename(name, target, src_dir_fd=folder, dst_dir_fd=top)
    except FileNotFoundError:
        pass


def walk(top: int) -> Iterator[tuple[str, str, int, os.stat_result]]:
    """Yield ``(path below the top, name, open directory that holds it, its status)`` for everything in a tree.

    The directory is open only until the next item.  A directory that is replaced meanwhile is left out.

    :raises ProviderError: the paths of the directories still to be walked do not fit into memory.
    """
    waiting = [""]
    kept = 0
    while waiting:
        path = waiting.pop()
        kept -= len(path)
        try:
            folder = _descend(top, path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno == errno.ELOOP:
                continue
            raise
        try:
            for name in sorted(os.listdir(folder)):
                try:
                    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                below = f"{path}/{name}" if path else name
                if stat.S_ISDIR(found.st_mode):
                    waiting.append(below)
                    kept = bounded(kept + len(below))
                yield below, name, folder, found
        finally:
            os.close(folder)


def bounded(characters: int) -> int:
    """Return the number of characters of paths in memory.

    :raises ProviderError: it is too large.  The owner of a tree decides how large it is.
    """
    if characters > _MAX_CHARACTERS:
        raise ProviderError(
            "The directory is too large to be compared",
            why=f"its paths have more than {_MAX_CHARACTERS} characters: it has too many files, or is too deep",
            fix="pack or delete files there",
        )
    return characters


def _descend(top: int, path: str) -> int:
    folder = os.open(".", DIRECTORY, dir_fd=top)
    for part in path.split("/") if path else ():
        try:
            below = os.open(part, DIRECTORY, dir_fd=folder)
        finally:
            os.close(folder)
        folder = below
    return folder


def change_owner(path: str | os.PathLike[str], owner: tuple[int, int], tick: Tick | None = None) -> None:
    """Give a tree that came from outside to its owner, and make it harmless.

    Files of others become the owner's without set-user-id bits; device nodes and file capabilities are deleted:
    the root of a guest may have made any of them.

    :raises ProviderError: a file has a further hard link outside of the tree.
    """
    with opened(os.fspath(path), DIRECTORY) as top:
        links: dict[tuple[int, int], int] = defaultdict(int)
        for _, _, _, found in walk(top):
            if not stat.S_ISDIR(found.st_mode) and found.st_nlink > 1:
                links[found.st_dev, found.st_ino] += 1
        for below, name, folder, found in walk(top):
            if tick:
                tick()
            kind = stat.S_IFMT(found.st_mode)
            if kind in {stat.S_IFBLK, stat.S_IFCHR}:
                os.unlink(name, dir_fd=folder)
                continue
            if kind == stat.S_IFREG:
                if found.st_nlink > max(1, links[found.st_dev, found.st_ino]):
                    raise ProviderError(
                        f"{below} has a further hard link outside of its directory",
                        fix="find out where it came from",
                    )
                _drop_capability(name, folder)
            if (found.st_uid, found.st_gid) != owner:
                os.chown(name, *owner, dir_fd=folder, follow_symlinks=False)
                if kind in {stat.S_IFREG, stat.S_IFDIR}:
                    with opened(name, _PATH, folder) as fd:
                        os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(found.st_mode) & ~0o6000)


def _drop_capability(name: str, folder: int) -> None:
    with opened(name, _PATH, folder) as fd:
        try:
            os.removexattr(f"/proc/self/fd/{fd}", "security.capability")
        except OSError:
            pass  # it has none, or the file system supports none


def disk_usage(path: str | os.PathLike[str], deadline: Deadline) -> int | None:
    """Return the bytes that a tree takes on disk; None when it cannot be read, or not in time."""
    seen: set[tuple[int, int]] = set()
    total = 0
    try:
        with opened(os.fspath(path), DIRECTORY) as top:
            for _, _, _, found in walk(top):
                if deadline.expired:
                    return None
                if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
                    if (found.st_dev, found.st_ino) in seen:
                        continue
                    seen.add((found.st_dev, found.st_ino))
                total += found.st_blocks * 512
    except (OSError, ProviderError):
        return None
    return total
