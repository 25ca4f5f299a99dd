"""Comparing two trees: owners, modes, links, times and contents."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from dispatcher.manager.files.safe_tree import bounded, walk
from dispatcher.plugin.tree_removal import DIRECTORY, Tick, opened

_CHUNK = 1 << 20
_MAX_DIFFERENCES = 5


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a manifest.

    :ivar content: SHA-256 of a file, target of a link, "" otherwise; :ivar same_as: the first path of a file with
        several hard links, "" otherwise; :ivar modified: whole seconds, 0 for links.
    """

    kind: str
    mode: int
    uid: int
    gid: int
    modified: int
    content: str
    same_as: str = ""


def manifest(path: str | os.PathLike[str], tick: Tick | None = None) -> dict[str, Item]:
    """Return the entries of a tree, by path, without sockets and devices.

    :raises OSError: a file cannot be read; :raises ProviderError: the manifest does not fit into memory.
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
            kept = bounded(kept + len(below))
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
    """Describe the first differences between two manifests; an empty list: they are equal.

    Times may differ by a second (file systems round), and ``lost+found`` is ignored.
    """
    found = []
    for path in sorted((before.keys() | after.keys()) - {"lost+found"}):
        one, two = before.get(path), after.get(path)
        if one is None or two is None:
            found.append(f"{path} is {'new' if one is None else 'missing'}")
        else:
            found += [f"{path} has another {change}" for change in _changes(one, two)]
        if len(found) >= _MAX_DIFFERENCES:
            break
    return found[:_MAX_DIFFERENCES]


def _changes(one: Item, two: Item) -> Iterator[str]:
    if one.kind != two.kind:
        yield "kind"
        return
    if one.content != two.content:
        yield "content"
    if (one.uid, one.gid) != (two.uid, two.gid):
        yield f"owner ({one.uid}:{one.gid}, then {two.uid}:{two.gid})"
    if one.mode != two.mode and one.kind != "l":
        yield f"mode ({one.mode:o}, then {two.mode:o})"
    if abs(one.modified - two.modified) > 1:
        yield "time of change"
    if one.same_as != two.same_as:
        yield "hard links"
