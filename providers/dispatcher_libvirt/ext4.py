"""Reader of ext4 images that a hostile guest wrote: bytes in, values out, with the standard library alone.

It supports enough of the format (Documentation/filesystems/ext4 of Linux) to list directories and read files.
It terminates on any input: numbers are checked, loops are bounded, and unsupported features raise `Ext4Error`.
`ext4_tool` nevertheless runs it in a sandbox.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAGIC = 0xEF53
_EXTENT_MAGIC = 0xF30A
_EXTENTS, _INLINE, _ENCRYPTED = 0x80000, 0x10000000, 0x800
_ROOT = 2
# Incompatible features that the reader supports: filetype, extents, 64bit, mmp, flex_bg, csum_seed, largedir.
_KNOWN = 0x2 | 0x40 | 0x80 | 0x100 | 0x200 | 0x2000 | 0x4000
_RECOVER = 0x4
_NAMES = {
    0x1: "compression",
    0x8: "external journal",
    0x10: "meta_bg",
    0x400: "ea_inode",
    0x8000: "inline_data",
    0x10000: "encryption",
    0x20000: "casefold",
}
_MOST_EXTENTS = 1 << 20
_LARGEST_DIRECTORY = 1 << 28


class Ext4Error(Exception):
    """The image is damaged, or uses an unsupported feature."""


@dataclass(frozen=True, slots=True)
class Inode:
    """One file of any kind; times in nanoseconds since the Unix epoch."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int
    links: int
    atime: int
    mtime: int
    flags: int
    block: bytes


@dataclass(frozen=True, slots=True)
class Extent:
    """Consecutive blocks of a file; `start` is None for a hole."""

    logical: int
    length: int
    start: int | None


class Image:
    """An ext4 file system.

    :param read: returns bytes at an offset; fewer than requested only at the end.
    :param size: of the image in bytes.
    :raises Ext4Error: it is not a readable file system.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size = read, size
        raw = read(1024, 1024)
        if len(raw) < 1024 or struct.unpack_from("<H", raw, 0x38)[0] != MAGIC:
            raise Ext4Error("there is no ext4 file system")
        self.inodes, blocks_low = struct.unpack_from("<II", raw, 0)
        first, log_size = struct.unpack_from("<II", raw, 0x14)
        self._per_block_group, _, self._per_group = struct.unpack_from("<III", raw, 0x20)
        incompatible = struct.unpack_from("<I", raw, 0x60)[0]
        if incompatible & _RECOVER:
            raise Ext4Error("its journal has not been replayed")
        if unknown := incompatible & ~_KNOWN:
            raise Ext4Error(
                "it uses " + ", ".join(_NAMES.get(1 << n, f"feature {1 << n:#x}") for n in _bits(unknown))
            )
        if log_size > 6:
            raise Ext4Error("its block size is invalid")
        self.block_size: int = 1024 << log_size
        self._inode_size = struct.unpack_from("<H", raw, 0x58)[0]
        wide = bool(incompatible & 0x80)
        self._descriptor = struct.unpack_from("<H", raw, 0xFE)[0] if wide else 32
        self.blocks = blocks_low | (struct.unpack_from("<I", raw, 0x150)[0] << 32 if wide else 0)
        self._table = (first + 1) * self.block_size
        sane = (
            128 <= self._inode_size <= self.block_size
            and 32 <= self._descriptor <= 1024
            and 0 < self._per_group <= 8 * self.block_size
            and 0 < self.inodes <= self._per_group * (1 + self.blocks // max(1, self._per_block_group))
            and 0 < self.blocks * self.block_size <= size
        )
        if not sane:
            raise Ext4Error("its superblock is invalid")

    def root(self) -> Inode:
        """Return the root directory."""
        inode = self.inode(_ROOT)
        if not stat.S_ISDIR(inode.mode):
            raise Ext4Error("its root is not a directory")
        return inode

    def inode(self, number: int) -> Inode:
        """Return an inode by its number.

        :raises Ext4Error: it does not exist, or is not in use.
        """
        if not 0 < number <= self.inodes:
            raise Ext4Error(f"there is no inode {number}")
        group, index = divmod(number - 1, self._per_group)
        descriptor = self._bytes(self._table + group * self._descriptor, self._descriptor)
        table = struct.unpack_from("<I", descriptor, 8)[0]
        if self._descriptor >= 64:
            table |= struct.unpack_from("<I", descriptor, 0x28)[0] << 32
        raw = self._bytes(self._offset(table) + index * self._inode_size, self._inode_size)
        mode, uid, low, atime, _, mtime, _, gid, links = struct.unpack_from("<HHIIIIIHH", raw, 0)
        flags = struct.unpack_from("<I", raw, 0x20)[0]
        high = struct.unpack_from("<I", raw, 0x6C)[0]
        uid |= struct.unpack_from("<H", raw, 0x78)[0] << 16
        gid |= struct.unpack_from("<H", raw, 0x7A)[0] << 16
        if links == 0 or mode == 0:
            raise Ext4Error(f"inode {number} is not in use")
        if flags & (_INLINE | _ENCRYPTED):
            raise Ext4Error(f"inode {number} is inline or encrypted")
        extra = struct.unpack_from("<H", raw, 0x80)[0] if self._inode_size > 128 else 0
        mtime_extra, atime_extra = struct.unpack_from("<II", raw, 0x88) if extra >= 16 else (0, 0)
        return Inode(
            number=number,
            mode=mode,
            uid=uid,
            gid=gid,
            size=low | high << 32,
            links=links,
            atime=_time(atime, atime_extra),
            mtime=_time(mtime, mtime_extra),
            flags=flags,
            block=raw[0x28:0x64],
        )

    def entries(self, directory: Inode) -> Iterator[tuple[bytes, int]]:
        """Yield names and inode numbers of a directory, without ``.`` and ``..``.

        :raises Ext4Error: an entry is damaged, or its name is invalid.
        """
        if directory.size > min(_LARGEST_DIRECTORY, self._size):
            raise Ext4Error(f"directory {directory.number} is too large")
        for extent in self.extents(directory):
            if extent.start is None:
                raise Ext4Error(f"directory {directory.number} has holes")
            for block in range(extent.start, extent.start + extent.length):
                yield from self._block_entries(self._bytes(self._offset(block), self.block_size), directory.number)

    def link(self, inode: Inode) -> bytes:
        """Return the target of a symbolic link."""
        if not 0 < inode.size <= 4096:
            raise Ext4Error(f"link {inode.number} has {inode.size} bytes")
        if inode.size < 60 and not inode.flags & _EXTENTS:
            target = inode.block[: inode.size]
        else:
            target = b"".join(data for _, data in self.content(inode))[: inode.size]
        if len(target) != inode.size or b"\0" in target:
            raise Ext4Error(f"link {inode.number} is damaged")
        return target

    def content(self, inode: Inode, chunk: int = 1 << 20) -> Iterator[tuple[int, bytes]]:
        """Yield offset and bytes of a file's content; the gaps are zeros (holes)."""
        step = max(1, chunk // self.block_size)
        for extent in self.extents(inode):
            if extent.start is None:
                continue
            for index in range(0, extent.length, step):
                count = min(step, extent.length - index)
                at = (extent.logical + index) * self.block_size
                if at >= inode.size:
                    return
                data = self._bytes(self._offset(extent.start + index, count), count * self.block_size)
                yield at, data[: inode.size - at]

    def extents(self, inode: Inode) -> Iterator[Extent]:
        """Yield the extents of a file in its order, each block once."""
        last = 0
        source = self._tree(inode.block, 6) if inode.flags & _EXTENTS else self._map(inode)
        for count, extent in enumerate(source):
            if count > _MOST_EXTENTS or extent.logical < last:
                raise Ext4Error(f"inode {inode.number} has blocks twice or too many")
            last = extent.logical + extent.length
            if extent.start is not None:
                self._offset(extent.start, extent.length)
            yield extent

    def _tree(self, node: bytes, depth: int) -> Iterator[Extent]:
        magic, count, _, level = struct.unpack_from("<HHHH", node, 0)
        if magic != _EXTENT_MAGIC or level >= depth or 12 + 12 * count > len(node):
            raise Ext4Error("an extent tree is damaged")
        for index in range(count):
            entry = node[12 + 12 * index : 24 + 12 * index]
            if level:
                low, high = struct.unpack_from("<IH", entry, 4)
                yield from self._tree(self._bytes(self._offset(low | high << 32), self.block_size), level)
                continue
            logical, length, high, low = struct.unpack("<IHHI", entry)
            unwritten = length > 32768
            blocks = length - 32768 if unwritten else length
            yield Extent(logical, blocks, None if unwritten else low | high << 32)

    def _map(self, inode: Inode) -> Iterator[Extent]:
        """Yield the blocks of a file without extents: twelve direct ones, then trees of one to three levels."""
        needed = -(-inode.size // self.block_size)
        per_block = self.block_size // 4
        pointers = struct.unpack("<15I", inode.block)
        logical = 0
        for index, pointer in enumerate(pointers):
            level = max(0, index - 11)
            if logical >= needed:
                return
            yield from self._pointers(pointer, level, logical, needed)
            logical += per_block**level

    def _pointers(self, pointer: int, level: int, logical: int, needed: int) -> Iterator[Extent]:
        if not pointer or logical >= needed:
            return
        if not level:
            yield Extent(logical, 1, pointer)
            return
        below = (self.block_size // 4) ** (level - 1)
        for index, inner in enumerate(struct.unpack(f"<{self.block_size // 4}I", self._block(pointer))):
            yield from self._pointers(inner, level - 1, logical + index * below, needed)

    def _block_entries(self, block: bytes, directory: int) -> Iterator[tuple[bytes, int]]:
        at = 0
        while at + 8 <= len(block):
            number, length, name_length, _ = struct.unpack_from("<IHBB", block, at)
            length = len(block) if length in {0, 0xFFFF} and self.block_size == 65536 else length
            if length < 8 or length % 4 or at + length > len(block) or name_length + 8 > length:
                raise Ext4Error(f"directory {directory} is damaged")
            name = block[at + 8 : at + 8 + name_length]
            at += length
            if number and name not in {b".", b".."}:
                if not name or b"/" in name or b"\0" in name:
                    raise Ext4Error(f"directory {directory} holds an invalid name")
                yield name, number

    def _block(self, number: int) -> bytes:
        return self._bytes(self._offset(number), self.block_size)

    def _offset(self, block: int, count: int = 1) -> int:
        if block <= 0 or block + count > self.blocks:
            raise Ext4Error(f"block {block} is outside of the file system")
        return block * self.block_size

    def _bytes(self, offset: int, length: int) -> bytes:
        data = self._read(offset, length)
        if len(data) != length:
            raise Ext4Error("the image ends too early")
        return data


def _time(seconds: int, extra: int) -> int:
    signed = seconds - (1 << 32) if seconds & 0x80000000 else seconds
    return (signed + ((extra & 3) << 32)) * 1_000_000_000 + min(extra >> 2, 999_999_999)


def _bits(value: int) -> Iterator[int]:
    return (n for n in range(32) if value >> n & 1)
