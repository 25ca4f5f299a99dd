"""Program for the sandbox: works on an ext4 image that a hostile guest wrote.

    ext4_tool.py unpack IMAGE DIRECTORY UID GID     copy the image's files into a directory
    ext4_tool.py times IMAGE DIRECTORY DEBUGFS      set files' full times from the directory that mke2fs copied

It needs only Python's standard library, and runs as the agent's user with access to nothing else.  It prints
``progress VALUE`` repeatedly, and at the end ``done COUNT`` or ``error TEXT``.

`unpack` keeps directories, files, links (symbolic and hard), FIFOs, modes, times and holes; it leaves out sockets
and devices.  All files belong to this user; those of other users in the image lose their setuid and setgid bits.

`times` completes the work of mke2fs, which copies the lower 32 bits of each time's seconds.  The rest
(nanoseconds, years from 2038 on) has a field of its own, which debugfs writes: see "inode timestamps" in Linux's
Documentation/filesystems/ext4.
"""

# ruff: noqa: T201 - its output is its interface
from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    from ext4 import Ext4Error, Image, Inode  # type: ignore[import-not-found] # alone in the sandbox
else:
    from dispatcher_libvirt.ext4 import Ext4Error, Image, Inode

MAX_ENTRIES = 20_000_000
MAX_SPARSENESS = 64  # a sparse file may be so many times larger than its image
_REPORT = 0.3  # seconds between two lines of progress


@dataclass
class Level:
    """A directory in progress."""

    inode: Inode
    entries: Iterator[tuple[bytes, int]]


class Unpacker:
    """Copies one image below the current directory.

    It descends and ascends by `chdir`, so that trees may have any depth and no path is resolved twice.
    """

    def __init__(self, image: Image, size: int, owner: tuple[int, int], report: Callable[[float], None]) -> None:
        self._image, self._size, self._owner, self._report = image, size, owner, report
        self._left = size  # bytes that remain: no two files share a block
        self._count = 0
        self._directories = {image.root().number}
        self._first: dict[int, str] = {}
        self._top = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def run(self) -> int:
        """Copy everything; return the number of entries.

        :raises Ext4Error: the image is damaged; :raises OSError: a write failed.
        """
        root = self._image.root()
        levels, names = [Level(root, self._image.entries(root))], [b"."]
        while levels:
            entry = next(levels[-1].entries, None)
            if entry is None:
                done, own = levels.pop(), names.pop()
                if levels:  # ascend first: the mode may forbid it
                    os.chdir("..")
                self._finish(own, done.inode)
                continue
            name, number = entry
            if len(levels) == 1 and name == b"lost+found":
                continue
            self._count += 1
            if self._count > MAX_ENTRIES:
                raise Ext4Error(f"there are over {MAX_ENTRIES} files")
            self._report(1 - self._left / self._size)
            inode = self._image.inode(number)
            if stat.S_ISDIR(inode.mode):
                if number in self._directories:
                    raise Ext4Error(f"directory {number} appears twice")
                self._directories.add(number)
                os.mkdir(name, 0o700)
                os.chdir(name)
                levels.append(Level(inode, self._image.entries(inode)))
                names.append(name)
            else:
                self._file(name, inode, b"/".join([*names[1:], name]))
        return self._count

    def _file(self, name: bytes, inode: Inode, path: bytes) -> None:
        if first := self._first.get(inode.number):
            os.link(first, name, src_dir_fd=self._top, follow_symlinks=False)
            return
        if stat.S_ISLNK(inode.mode):
            os.symlink(self._image.link(inode), name)
        elif stat.S_ISREG(inode.mode):
            self._regular(name, inode)
        elif stat.S_ISFIFO(inode.mode):
            os.mkfifo(name, 0o600)
        else:
            return
        if inode.links > 1:
            self._first[inode.number] = os.fsdecode(path)
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


def times(image: Image) -> Iterator[tuple[int, int]]:
    """Yield inode numbers and `extra_time` of their modification times, for the tree of the current directory.

    It descends and ascends by `chdir`, so that trees may have any depth.
    """
    root = image.root()
    seen: set[int] = set()
    levels: list[tuple[Inode, Iterator[tuple[bytes, int]]]] = [(root, image.entries(root))]
    yield root.number, extra_time(os.lstat(".").st_mtime_ns)
    while levels:
        entry = next(levels[-1][1], None)
        if entry is None:
            levels.pop()
            if levels:
                os.chdir("..")
            continue
        name, number = entry
        try:
            found = os.lstat(name)
        except FileNotFoundError:  # created by mke2fs itself
            continue
        if stat.S_ISDIR(found.st_mode):
            yield number, extra_time(found.st_mtime_ns)
            os.chdir(name)
            levels.append((image.inode(number), image.entries(image.inode(number))))
        elif found.st_nlink == 1 or number not in seen:
            if found.st_nlink > 1:
                seen.add(number)
            yield number, extra_time(found.st_mtime_ns)


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
    report, count = Report(), 0
    with tempfile.NamedTemporaryFile("w", encoding="ascii") as script:
        for number, value in times(image):
            if value:
                script.write(f"set_inode_field <{number}> mtime_extra {value}\n")
                count += 1
            report(0.0)
        script.flush()
        command = [debugfs, "-w", "-f", script.name, path]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace").strip())
    return count


def main(arguments: list[str]) -> int:
    """Run the program."""
    command, path, directory, *rest = arguments
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    size = os.lseek(fd, 0, os.SEEK_END)
    os.umask(0)
    os.chdir(directory)
    try:
        image = Image(lambda offset, length: os.pread(fd, length, offset), size)
        if command == "unpack":
            count = Unpacker(image, size, (int(rest[0]), int(rest[1])), Report()).run()
        else:
            count = set_times(image, path, rest[0])
    except (Ext4Error, OSError, RecursionError, OverflowError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        print(f"error {text or type(error).__name__}", flush=True)
        return 1
    print(f"done {count}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
