"""Reader of ext4 images that a hostile guest wrote, and a program for the sandbox that works on them.

    ext4.py unpack IMAGE DIRECTORY UID GID     copy the image's files into a directory
    ext4.py times IMAGE DIRECTORY DEBUGFS      set files' full times from the directory that mke2fs copied
    ext4.py measure "" DIRECTORY               count entries, the bytes that they take, and the longest path's

It needs only Python's standard library, and runs as the agent's user with access to nothing else.  It prints
``progress VALUE`` repeatedly, and at the end ``done COUNT [BYTES PATH]`` or ``error TEXT``.

The reader supports enough of the format (Documentation/filesystems/ext4 of Linux) to list directories and read
files.  It terminates on any input: numbers are checked, loops are bounded, and unsupported features raise
`Ext4Error`.

`unpack` keeps directories, files, links (symbolic and hard), FIFOs, modes, times and holes; it leaves out sockets
and devices.  All files belong to this user; those of other users in the image lose their setuid and setgid bits.

`times` completes the work of mke2fs, which copies the lower 32 bits of each time's seconds.  The rest
(nanoseconds, years from 2038 on) has a field of its own, which debugfs writes: see "inode timestamps" in Linux's
Documentation/filesystems/ext4.
"""

# ruff: noqa: T201 - its output is its interface
from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_ENTRIES = 20_000_000
MAX_SPARSENESS = 64  # a sparse file may be so many times larger than its image
_REPORT = 0.3  # seconds between two lines of progress

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
        if not inode.size:
            return
        if not inode.flags & _EXTENTS:
            raise Ext4Error(f"inode {inode.number} has a block map, which a disk of the dispatcher's never has")
        last = 0
        for count, extent in enumerate(self._tree(inode.block, 6)):
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


def walk(image: Image, visit: Callable[[bytes, int, int], bool], leave: Callable[[bytes, Inode], None]) -> None:
    """Walk through the tree of an image, and by `chdir` through the same tree of files: it may have any depth.

    :param visit: called with name, inode number and depth of each entry; returns whether to descend into it.
    :param leave: called with name and inode of a directory after its entries, in the directory above it.
    """
    root = image.root()
    levels = [(b".", root, image.entries(root))]
    while levels:
        entry = next(levels[-1][2], None)
        if entry is None:
            name, inode, _ = levels.pop()
            if levels:
                os.chdir("..")
            leave(name, inode)
        elif visit(*entry, len(levels)):
            inode = image.inode(entry[1])
            os.chdir(entry[0])
            levels.append((entry[0], inode, image.entries(inode)))


class Unpacker:
    """Copies one image into the current directory."""

    def __init__(self, image: Image, size: int, owner: tuple[int, int], report: Callable[[float], None]) -> None:
        self._image, self._size, self._owner, self._report = image, size, owner, report
        self._left = size  # bytes that remain: no two files share a block
        self._count = 0
        self._directories = {image.root().number}
        # A temporary directory with the first name of each file that has several: its path may be too long.
        self._links = tempfile.mkdtemp(dir=".")
        self._links_fd = os.open(self._links, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def run(self) -> int:
        """Copy everything; return the number of entries.

        :raises Ext4Error: the image is damaged; :raises OSError: a write failed.
        """
        walk(self._image, self._visit, self._leave)
        return self._count

    def _visit(self, name: bytes, number: int, depth: int) -> bool:
        if depth == 1 and name == b"lost+found":
            return False
        self._count += 1
        if self._count > MAX_ENTRIES:
            raise Ext4Error(f"there are over {MAX_ENTRIES} files")
        self._report(1 - self._left / self._size)
        inode = self._image.inode(number)
        if not stat.S_ISDIR(inode.mode):
            self._file(name, inode)
            return False
        if number in self._directories:
            raise Ext4Error(f"directory {number} appears twice")
        self._directories.add(number)
        os.mkdir(name, 0o700)
        return True

    def _leave(self, name: bytes, inode: Inode) -> None:
        if name == b".":
            shutil.rmtree(self._links)
        self._finish(name, inode)

    def _file(self, name: bytes, inode: Inode) -> None:
        if inode.links > 1:
            try:
                os.link(str(inode.number), name, src_dir_fd=self._links_fd, follow_symlinks=False)
                return
            except FileNotFoundError:
                pass  # the first of its names
        if stat.S_ISLNK(inode.mode):
            os.symlink(self._image.link(inode), name)
        elif stat.S_ISREG(inode.mode):
            self._regular(name, inode)
        elif stat.S_ISFIFO(inode.mode):
            os.mkfifo(name, 0o600)
        else:
            return
        if inode.links > 1:
            os.link(name, str(inode.number), dst_dir_fd=self._links_fd, follow_symlinks=False)
        self._finish(name, inode)

    def _regular(self, name: bytes, inode: Inode) -> None:
        if inode.size > self._size * MAX_SPARSENESS:
            raise Ext4Error(f"file {inode.number} has {inode.size} bytes")
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            for offset, data in self._image.content(inode):
                self._left -= len(data)
                if self._left < 0:
                    raise Ext4Error("files share blocks")
                at = 0
                while at < len(data):
                    at += os.pwrite(fd, data[at:], offset + at)
                self._report(1 - self._left / self._size)
            os.ftruncate(fd, inode.size)
        finally:
            os.close(fd)

    def _finish(self, name: bytes, inode: Inode) -> None:
        if not stat.S_ISLNK(inode.mode):
            mode = stat.S_IMODE(inode.mode)
            os.chmod(name, mode if (inode.uid, inode.gid) == self._owner else mode & ~0o6000)
        os.utime(name, ns=(inode.atime, inode.mtime), follow_symlinks=False)


def extra_time(nanoseconds: int) -> int:
    """Return the inode field that complements the lower 32 bits of a time's seconds."""
    seconds, fraction = divmod(nanoseconds, 1_000_000_000)
    low = (seconds + 0x80000000) % 0x100000000 - 0x80000000
    return (seconds - low >> 32) & 3 | fraction << 2


def times(image: Image) -> dict[int, int]:
    """Return `extra_time` of the modification times of the current directory's tree, by inode number."""
    found = {image.root().number: extra_time(os.lstat(".").st_mtime_ns)}

    def visit(name: bytes, number: int, _: int) -> bool:
        try:
            status = os.lstat(name)
        except FileNotFoundError:  # created by mke2fs itself
            return False
        found[number] = extra_time(status.st_mtime_ns)
        return stat.S_ISDIR(status.st_mode)

    walk(image, visit, lambda *_: None)
    return found


class Report:
    """Prints progress, at most three times a second."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, value: float) -> None:
        if time.monotonic() - self._last > _REPORT:
            self._last = time.monotonic()
            print(f"progress {min(1.0, max(0.0, value)):.3f}", flush=True)


def set_times(image: Image, path: str, debugfs: str) -> int:
    """Write the times of the current directory's tree into an image; return the number of changed inodes.

    :raises OSError: debugfs failed.
    """
    changes = {number: value for number, value in times(image).items() if value}
    with tempfile.NamedTemporaryFile("w", encoding="ascii") as script:
        script.writelines(f"set_inode_field <{number}> mtime_extra {value}\n" for number, value in changes.items())
        script.flush()
        command = [debugfs, "-w", "-f", script.name, path]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace").strip())
    return len(changes)


def measure() -> tuple[int, int, int]:
    """Return the number of entries below the current directory, their bytes, and the longest path's length."""
    count = size = longest = 0
    levels = [(0, iter(os.listdir(b".")))]
    while levels:
        length, names = levels[-1]
        name = next(names, None)
        if name is None:
            levels.pop()
            if levels:
                os.chdir("..")
            continue
        status = os.lstat(name)
        length += 1 + len(name)
        count, size, longest = count + 1, size + status.st_blocks * 512, max(longest, length)
        if stat.S_ISDIR(status.st_mode):
            os.chdir(name)
            levels.append((length, iter(os.listdir(b"."))))
    return count, size, longest


def main(arguments: list[str]) -> int:
    """Run the program."""
    command, path, directory, *rest = arguments
    os.umask(0)
    try:
        fd = os.open(path or os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        size = os.lseek(fd, 0, os.SEEK_END)
        os.chdir(directory)
        if command == "measure":
            done = " ".join(map(str, measure()))
        else:
            image = Image(lambda offset, length: os.pread(fd, length, offset), size)
            if command == "unpack":
                done = str(Unpacker(image, size, (int(rest[0]), int(rest[1])), Report()).run())
            else:
                done = str(set_times(image, path, rest[0]))
    except (Ext4Error, OSError, RecursionError, OverflowError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        print(f"error {text or type(error).__name__}", flush=True)
        return 1
    print(f"done {done}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
