"""Directory trees that an attacker may write to: make, walk and change owners safely.

`dispatcher.plugin.tree_removal` deletes them.

An agent owns its data directory and may change it while the manager, often as root, works there.  So no function
here opens a path inside a tree: each step goes from an open directory to one name in it, with ``O_NOFOLLOW``, and
has no effect outside of the tree, even if that name was replaced.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import ProviderError
from dispatcher.plugin.tree_removal import DIRECTORY, PATH, Tick, opened

_MAX_CHARACTERS = 1 << 29  # of paths in memory at a time: some millions of files, or a very deep tree


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether `path` exists, a dangling link included."""
    return os.path.lexists(path)


def make_directory(path: str | os.PathLike[str], mode: int, owner: tuple[int, int] | None = None) -> None:
    """Make a directory, or give an existing one its mode and owner.

    Its parent must be trusted.

    :raises ProviderError: it is not a directory, but a symbolic link, say.
    """
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise ProviderError(f"{path} is not a directory", why="it is another kind of file", fix="move it away")
    wrong_owner = owner is not None and (found.st_uid, found.st_gid) != owner
    if wrong_owner or stat.S_IMODE(found.st_mode) != mode:
        with opened(os.fspath(path), PATH | os.O_DIRECTORY) as fd:
            handle = f"/proc/self/fd/{fd}"
            if wrong_owner and owner is not None:
                os.chown(handle, *owner)
            os.chmod(handle, mode)


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
                    with opened(name, PATH, folder) as fd:
                        os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(found.st_mode) & ~0o6000)


def _drop_capability(name: str, folder: int) -> None:
    with opened(name, PATH, folder) as fd:
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
