"""Directory trees that somebody hostile may write to.  Touches the file system below what it is given.

An agent owns what is in its data directory and may change it while the manager, often as root, works there.
So nothing here opens a path inside a tree: every step goes from an open directory to one name in it, with
``O_NOFOLLOW``, and no step has an effect outside the tree whatever that name was swapped for.  Trees may be of
any depth: at most three descriptors are open at a time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DeadlineExceeded, ProviderError

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 20
_MOST_DIFFERENCES = 5
_MOST_NAMES = 1 << 29  # characters of paths that are kept at a time: some millions of files, or a very deep tree

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
    """Whether there is anything at `path`, a dangling link included."""
    return os.path.lexists(path)


def make_directory(path: str | os.PathLike[str], mode: int, owner: tuple[int, int] | None = None) -> bool:
    """Make a directory, or give an existing one its mode and owner; return whether it was made.

    Its parent must be trusted.

    :raises ProviderError: there is something else, such as a symbolic link.
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
        raise ProviderError(f"{path} is no directory", why="something else is in its place", fix="move it away")
    wrong_owner = owner is not None and (found.st_uid, found.st_gid) != owner
    if wrong_owner or stat.S_IMODE(found.st_mode) != mode:
        with opened(os.fspath(path), _PATH | os.O_DIRECTORY) as fd:
            handle = f"/proc/self/fd/{fd}"
            if wrong_owner and owner is not None:
                os.chown(handle, *owner)
            os.chmod(handle, mode)
    return made


def remove_tree(path: str | os.PathLike[str], *, deadline: Deadline, tick: Tick | None = None) -> None:
    """Delete whatever is at `path`; nothing there is success.  Links are deleted, never followed.

    Deep trees are flattened while they are deleted: each directory's subdirectories are moved up to the top.

    :raises DeadlineExceeded: something keeps filling the tree.
    :raises OSError: something cannot be deleted.
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
        with contextlib.suppress(FileNotFoundError):  # somebody else deleted it, too
            os.rmdir(name, dir_fd=folder)
    finally:
        os.close(folder)


def _enter(name: str, folder: int) -> int | None:
    """Open a directory, readable for its owner; None when it is something else."""
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
                    "A directory cannot be deleted in time", why="something keeps writing to it"
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
                            _lift(item, below, f"{prefix}-{count}", top)
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
    """Return some names in a directory, bounded, so that a huge one does not fill the memory."""
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
    """Delete what is no directory; return whether it is gone."""
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


def _lift(name: str, folder: int, target: str, top: int) -> None:
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

    The directory is open only until the next item.  A directory that is swapped away meanwhile is left out.

    :raises ProviderError: the directories still to be seen have longer paths, all together, than fit into memory.
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
                    kept = _bounded(kept + len(below))
                yield below, name, folder, found
        finally:
            os.close(folder)


def _bounded(characters: int) -> int:
    """Return the number.

    :raises ProviderError: so much is not kept in memory.  Whoever owns a tree decides how large it seems.
    """
    if characters > _MOST_NAMES:
        raise ProviderError(
            "The directory is too large to be compared",
            why=f"the paths in it have more than {_MOST_NAMES} characters: it has too many files, or is too deep",
            fix="look what its owner keeps there, and pack or delete it",
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


def take_over(path: str | os.PathLike[str], owner: tuple[int, int], tick: Tick | None = None) -> None:
    """Make a tree that came from outside harmless, and its owner's.

    What belongs to others becomes the owner's without set-user-id bits; device nodes are deleted, and so are
    file capabilities: a guest's root may have made any of them.

    :raises ProviderError: a file has a further name outside the tree.
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
                        f"{below} has a further name outside of its directory", fix="look where it came from"
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
            pass  # it has none, or the file system knows none


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


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a manifest.

    :ivar content: SHA-256 of a file, target of a link, "" for others; :ivar same_as: the first path of the same
        file when it has several names, "" otherwise; :ivar modified: whole seconds, 0 for links.
    """

    kind: str
    mode: int
    uid: int
    gid: int
    modified: int
    content: str
    same_as: str = ""


def manifest(path: str | os.PathLike[str], tick: Tick | None = None) -> dict[str, Item]:
    """Return what is in a tree, by path: owners, modes, links, times, contents.  Sockets and devices are left out.

    :raises OSError: something cannot be read; :raises ProviderError: it does not fit into memory.
    """
    items: dict[str, Item] = {}
    kept = 0
    names: dict[tuple[int, int], list[str]] = defaultdict(list)
    with opened(os.fspath(path), DIRECTORY) as top:
        for below, name, folder, found in walk(top):
            if tick:
                tick()
            kind = stat.filemode(found.st_mode)[0]
            if kind in "sbc":
                continue
            content = ""
            if kind == "l":
                content = os.readlink(name, dir_fd=folder)
            elif kind == "-":
                content = _digest(name, folder, tick)
                if found.st_nlink > 1:
                    names[found.st_dev, found.st_ino].append(below)
            modified = 0 if kind == "l" else int(found.st_mtime)
            kept = _bounded(kept + len(below))
            items[below] = Item(kind, stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, modified, content)
    for paths in names.values():
        for below in paths if len(paths) > 1 else ():
            items[below] = replace(items[below], same_as=min(paths))
    return items


def _digest(name: str, folder: int, tick: Tick | None) -> str:
    digest = hashlib.sha256()
    with opened(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, folder) as fd:
        while block := os.read(fd, _CHUNK):
            digest.update(block)
            if tick:
                tick()
    return digest.hexdigest()


def differences(before: Mapping[str, Item], after: Mapping[str, Item]) -> list[str]:
    """Return in words how two manifests differ, a few at most; an empty list: they are alike.

    Times may differ by a second (file systems round), and an empty ``lost+found`` does not count.
    """
    found = []
    for path in sorted(before.keys() | after.keys()):
        one, two = before.get(path), after.get(path)
        if one is None or two is None:
            if path != "lost+found":
                found.append(f"{path} is {'new' if one is None else 'missing'}")
        else:
            found += _changes(path, one, two)
        if len(found) >= _MOST_DIFFERENCES:
            break
    return found[:_MOST_DIFFERENCES]


def _changes(path: str, one: Item, two: Item) -> list[str]:
    if one.kind != two.kind:
        return [f"{path} is of another kind"]
    changes = []
    if one.content != two.content:
        changes.append("content" if one.kind == "-" else "target")
    if (one.uid, one.gid) != (two.uid, two.gid):
        changes.append(f"owner ({one.uid}:{one.gid}, then {two.uid}:{two.gid})")
    if one.mode != two.mode and one.kind != "l":
        changes.append(f"mode ({one.mode:o}, then {two.mode:o})")
    if abs(one.modified - two.modified) > 1:
        changes.append("time of change")
    if one.same_as != two.same_as:
        changes.append("hard links")
    return [f"{path} has another {change}" for change in changes]
