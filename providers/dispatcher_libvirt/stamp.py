"""Program for the sandbox: `stamp.py DEBUGFS IMAGE DIRECTORY` gives files in a new ext4 image their whole times.

mke2fs has filled the image from the directory, and kept of each time the lower 32 bits of its seconds.  The rest,
nanoseconds and the years from 2038 on, belongs into a field of its own (Documentation/filesystems/ext4 of Linux,
inode timestamps), which debugfs writes.  Prints ``progress N`` now and then, at last ``done N`` or ``error TEXT``.
"""

# ruff: noqa: T201 - what it prints is its interface
from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    from ext4 import Ext4Error, Image, Inode  # type: ignore[import-not-found] # alone in the sandbox
else:
    from dispatcher_libvirt.ext4 import Ext4Error, Image, Inode

_TELL = 0.3  # seconds


def extra(nanoseconds: int) -> int:
    """Return what an inode keeps of a time beside the lower 32 bits of its seconds."""
    seconds, fraction = divmod(nanoseconds, 1_000_000_000)
    low = (seconds + 0x80000000) % 0x100000000 - 0x80000000
    return (seconds - low >> 32) & 3 | fraction << 2


def times(image: Image) -> Iterator[tuple[int, int]]:
    """Yield inode numbers and `extra` of their time of change, for the tree of the current directory.

    Goes down and up by `chdir`, so that trees may be of any depth.
    """
    root = image.root()
    seen: set[int] = set()
    levels: list[tuple[Inode, Iterator[tuple[bytes, int]]]] = [(root, image.entries(root))]
    yield root.number, extra(os.lstat(".").st_mtime_ns)
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
        except FileNotFoundError:  # made by mke2fs itself
            continue
        if stat.S_ISDIR(found.st_mode):
            yield number, extra(found.st_mtime_ns)
            os.chdir(name)
            levels.append((image.inode(number), image.entries(image.inode(number))))
        elif found.st_nlink == 1 or number not in seen:
            if found.st_nlink > 1:
                seen.add(number)
            yield number, extra(found.st_mtime_ns)


def main(arguments: list[str]) -> int:
    """Run the program."""
    debugfs, path, directory = arguments
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    count, told = 0, time.monotonic()
    os.chdir(directory)
    try:
        image = Image(lambda offset, length: os.pread(fd, length, offset), os.lseek(fd, 0, os.SEEK_END))
        with tempfile.NamedTemporaryFile("w", encoding="ascii") as script:
            for number, value in times(image):
                if value:
                    script.write(f"set_inode_field <{number}> mtime_extra {value}\n")
                    count += 1
                if time.monotonic() - told > _TELL:
                    told = time.monotonic()
                    print(f"progress {count}", flush=True)
            script.flush()
            done = subprocess.run(
                [debugfs, "-w", "-f", script.name, path],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
        if done.returncode:
            raise OSError(done.stderr.decode(errors="replace").strip())
    except (Ext4Error, OSError) as error:
        print(f"error {error}", flush=True)
        return 1
    print(f"done {count}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
