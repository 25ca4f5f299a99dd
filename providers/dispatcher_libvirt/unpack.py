"""Program for the sandbox: `unpack.py IMAGE DIRECTORY UID GID` copies an ext4 image's files into a directory.

Runs by itself with Python's standard library, as the agent's own user, with nothing in sight but the two.
Directories, files, links (symbolic and hard), FIFOs, modes, times and holes are kept; sockets and devices are
left out.  Everything made belongs to this user; what belonged to another in the image loses its setuid and
setgid bits.  Prints a line ``progress FRACTION`` now and then, and at last ``done N`` or ``error TEXT``.
"""

# ruff: noqa: T201 - what it prints is its interface
from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    from ext4 import Ext4Error, Image, Inode  # type: ignore[import-not-found] # alone in the sandbox
else:
    from dispatcher_libvirt.ext4 import Ext4Error, Image, Inode

MOST_ENTRIES = 20_000_000
LARGEST_FACTOR = 64  # a sparse file may seem so many times larger than the image that it lies in


@dataclass
class Level:
    """A directory that is being filled."""

    inode: Inode
    entries: Iterator[tuple[bytes, int]]


class Unpacker:
    """Copies one image below the current directory.

    Goes down and up by `chdir`, so that trees may be of any depth and no path is followed twice.
    """

    def __init__(self, image: Image, size: int, owner: tuple[int, int], tell: Callable[[float], None]) -> None:
        self._image, self._size, self._owner, self._tell = image, size, owner, tell
        self._left = size  # bytes that may still be written: blocks are never shared by two files
        self._count = 0
        self._directories = {image.root().number}
        self._first: dict[int, str] = {}
        self._top = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def run(self) -> int:
        """Copy everything; return how many entries there were.

        :raises Ext4Error: the image is damaged; :raises OSError: something cannot be written.
        """
        root = self._image.root()
        levels, names = [Level(root, self._image.entries(root))], [b"."]
        while levels:
            entry = next(levels[-1].entries, None)
            if entry is None:
                done, own = levels.pop(), names.pop()
                if levels:  # up first: its mode may be one that lets nobody pass
                    os.chdir("..")
                self._finish(own, done.inode)
                continue
            name, number = entry
            if len(levels) == 1 and name == b"lost+found":
                continue
            self._count += 1
            if self._count > MOST_ENTRIES:
                raise Ext4Error(f"there are over {MOST_ENTRIES} files")
            self._tell(1 - self._left / self._size)
            inode = self._image.inode(number)
            if stat.S_ISDIR(inode.mode):
                if number in self._directories:
                    raise Ext4Error(f"directory {number} has two places")
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
        if inode.size > self._size * LARGEST_FACTOR:
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
                self._tell(1 - self._left / self._size)
            os.ftruncate(fd, inode.size)
        finally:
            os.close(fd)

    def _finish(self, name: bytes, inode: Inode) -> None:
        if not stat.S_ISLNK(inode.mode):
            mode = stat.S_IMODE(inode.mode)
            os.chmod(name, mode if (inode.uid, inode.gid) == self._owner else mode & ~0o6000)
        os.utime(name, ns=(inode.atime, inode.mtime), follow_symlinks=False)


def main(arguments: list[str]) -> int:
    """Run the program."""
    image_path, directory, uid, gid = arguments
    last = [0.0]

    def tell(fraction: float) -> None:
        now = time.monotonic()
        if now - last[0] > 0.3:
            last[0] = now
            print(f"progress {min(1.0, max(0.0, fraction)):.3f}", flush=True)

    fd = os.open(image_path, os.O_RDONLY | os.O_CLOEXEC)
    size = os.lseek(fd, 0, os.SEEK_END)
    os.umask(0)
    os.chdir(directory)
    try:
        image = Image(lambda offset, length: os.pread(fd, length, offset), size)
        count = Unpacker(image, size, (int(uid), int(gid)), tell).run()
    except (Ext4Error, OSError, RecursionError, OverflowError, ValueError) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        print(f"error {words or type(error).__name__}", flush=True)
        return 1
    print(f"done {count}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
