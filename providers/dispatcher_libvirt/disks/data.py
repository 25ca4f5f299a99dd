"""Data disks as files of this host: create, grow, repair, copy, export and import, without starting a machine.

A data disk has an ext4 file system without partitions.  A guest wrote it, so the programs that read it run in the
sandbox, as the agent's user.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dispatcher.plugin import Deadline, DeadlineExceeded, NotFound, Progress, ProviderError, printable
from dispatcher_libvirt.disks import sandbox
from dispatcher_libvirt.disks.ext4 import MAX_SPARSENESS
from dispatcher_libvirt.disks.sandbox import Bind, Result, Tick
from dispatcher_libvirt.errors import disk_errors
from dispatcher_libvirt.options import MIB

IMAGE, SOURCE, OUTPUT = "/image", "/source", "/out"  # paths in the sandbox
_FICLONE = 0x40049409
_CHUNK = 8 << 20
_BYTES_PER_INODE = 8192
_MAX_PATH = 2000  # with 2,040 characters mke2fs writes past the end of its buffer
_LABEL = "dispatcher-data"

User = tuple[int, int] | None


class DataDisk:
    """The data disk of one machine, for one operation.

    :param user: host user and group of the machine; None where everything belongs to this user.
    :param tick: called about twice a second; an exception from it ends the operation.
    """

    def __init__(self, path: Path, user: User, deadline: Deadline, tick: Tick) -> None:
        self.path = path
        self._user, self._deadline, self._tick = user, deadline, tick
        self._machine = printable(path.parent.name)

    def create(self, size: int, *, full: bool = False) -> None:
        """Create an empty disk.

        :param full: allocate its space at once.
        :raises ProviderError: no space, or a tool is missing.
        """
        with self._replacing(size, full=full) as new:
            new.make_file_system(inodes=0)

    def restore_owner(self) -> None:
        """Give the disk back to its user, where libvirt was stopped before it could."""
        with disk_errors("looking at a data disk", self.path.parent):
            self.path.chmod(0o600)
            if self._user is not None:
                os.chown(self.path, *self._user, follow_symlinks=False)

    def grow(self, size: int, *, full: bool = False) -> None:
        """Enlarge the disk and keep its content; a larger one stays as it is."""
        before = self.path.stat().st_size
        if before >= size:
            return
        self.repair(thorough=True)
        with disk_errors("growing a data disk", self.path.parent):
            _resize(self.path, size, full=full)
        result = self._run(["resize2fs", IMAGE])
        if result.code:
            os.truncate(self.path, before)
            raise ProviderError(
                f"The data disk of {self._machine} cannot grow", why=result.last_line, fix=f"check {self.path}"
            )

    def repair(self, *, thorough: bool = False) -> None:
        """Replay the journal and repair the disk after a power cut; quick after a clean shutdown.

        :raises ProviderError: it is beyond repair.
        """
        result = self._run(["e2fsck", "-p", *(["-f"] if thorough else []), IMAGE])
        if result.code & ~3:
            result = self._run(["e2fsck", "-y", "-f", IMAGE])
        if result.code & ~3:
            raise ProviderError(
                f"The data disk of {self._machine} is damaged",
                why=result.last_line,
                fix=f"check it with e2fsck ({self.path}), restore a snapshot, or reset the agent's data",
            )

    def export_to(self, directory: Path, progress: Progress) -> None:
        """Copy the content into an empty directory, which then belongs to the agent's user.

        :raises NotFound: there is no disk; :raises ProviderError: it is not completely readable.
        """
        if not self.path.exists():
            raise NotFound(f"{self._machine} has no data disk", fix="start the agent once, or import data")
        if any(directory.iterdir()):
            raise ProviderError(f"{directory} is not empty", fix="export into an empty directory")
        last = ""

        def line(text: str) -> None:
            nonlocal last
            word, _, value = text.partition(" ")
            if word == "progress":
                progress("exporting", "", float(value))
            else:
                last = text

        self.restore_owner()
        self.repair()
        if self._user is not None:
            os.chown(directory, *self._user, follow_symlinks=False)
        program, bind = sandbox.python("ext4.py")
        owner = self._user or (os.geteuid(), os.getegid())
        result = sandbox.run(
            [*program, "unpack", IMAGE, OUTPUT, *map(str, owner)],
            binds=[*bind, Bind(self.path, IMAGE), Bind(directory, OUTPUT, writable=True)],
            user=self._user,
            deadline=self._deadline,
            tick=self._tick,
            line=line,
            file_size=self.path.stat().st_size * MAX_SPARSENESS,
        )
        if result.code or not last.startswith("done "):
            raise ProviderError(
                f"The data disk of {self._machine} is not completely readable",
                why=last.removeprefix("error ") or result.last_line,
                fix="start the agent and check, restore a snapshot, or provide more space for the copy",
            )

    def import_from(self, directory: Path, size: int) -> None:
        """Replace the disk by a new one with a copy of a directory; the old one stays until that is complete.

        :param size: of the new disk in bytes; :raises ProviderError: the data needs more, or is not readable.
        """
        program, bind = sandbox.python("ext4.py")
        result = sandbox.run(
            [*program, "measure", "", SOURCE],
            binds=[*bind, Bind(directory, SOURCE)],
            user=self._user,
            deadline=self._deadline,
            tick=self._tick,
            read_all=True,
        )
        if result.code:
            raise _failed("The directory cannot be read", result, "check that its files are readable")
        count, needed, longest = map(int, result.last_line.split()[1:])
        if longest > _MAX_PATH:
            raise ProviderError(
                f"A path in the data is {longest} characters long",
                why=f"mke2fs, which copies it, fails beyond {_MAX_PATH}",
                fix="let the agent move or remove its deepest directories",
            )
        if needed > size:
            raise ProviderError(
                "The data does not fit on the data disk",
                why=f"it takes {-(-needed // MIB)} MiB, the disk has {size // MIB}",
                fix="raise the app's disk limit",
            )
        with self._replacing(size) as new:
            new.make_file_system(directory, inodes=count + count // 4 + 1024)

    @contextmanager
    def _replacing(self, size: int, *, full: bool = False) -> Iterator[DataDisk]:
        """Yield a blank disk that replaces this one on success, and is removed otherwise."""
        path = self.path.with_name(f".{secrets.token_hex(4)}.new")
        new = DataDisk(path, self._user, self._deadline, self._tick)
        try:
            with disk_errors("creating a data disk", path.parent):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                new.restore_owner()
                _resize(path, size, full=full)
            yield new
            with disk_errors("creating a data disk", path.parent):
                path.rename(self.path)
        finally:
            path.unlink(missing_ok=True)

    def make_file_system(self, source: Path | None = None, *, inodes: int) -> None:
        """Format the blank disk, with a copy of `source`.

        :param inodes: number of files that it must have room for, at least.
        """
        uid, gid = self._user or (os.geteuid(), os.getegid())
        # Whatever the disk's size: blocks for the longest symbolic link, inodes with full times.
        argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-L", _LABEL]
        argv += ["-N", str(max(inodes, self.path.stat().st_size // _BYTES_PER_INODE))]
        argv += ["-E", f"root_owner={uid}:{gid},lazy_itable_init=1,lazy_journal_init=1"]
        result = self._run([*argv, *(["-d", SOURCE] if source else []), IMAGE], source)
        if result.code:
            small = "could not allocate" in result.output.lower() or "no free space" in result.output.lower()
            if small:
                raise _failed("The data does not fit on the data disk", result, "raise the app's disk limit")
            raise _failed(
                "The data disk cannot be created", result, f"check {self.path.parent} and its file system"
            )
        debugfs = sandbox.tool("debugfs")
        self._run([debugfs, "-w", "-R", "rmdir lost+found", IMAGE])  # e2fsck creates it again when it needs it
        if source is not None:
            program, bind = sandbox.python("ext4.py")
            result = self._run([*program, "times", IMAGE, SOURCE, debugfs], source, bind)
            if result.code:
                fix = "check that the directory's files are readable"
                raise _failed("The times of files cannot be written to the data disk", result, fix)

    def _run(self, argv: list[str], source: Path | None = None, binds: Sequence[Bind] = ()) -> Result:
        """Run a program in the sandbox on the disk; with `source`, it reads all files of that directory."""
        read_all = source is not None
        if read_all and self._user is not None:
            os.chown(self.path, 0, 0)
        try:
            return sandbox.run(
                [argv[0] if "/" in argv[0] else sandbox.tool(argv[0]), *argv[1:]],
                binds=[Bind(self.path, IMAGE, writable=True), *([Bind(source, SOURCE)] if source else []), *binds],
                user=self._user,
                deadline=self._deadline,
                tick=self._tick,
                read_all=read_all,
            )
        finally:
            if read_all and self._user is not None:
                os.chown(self.path, *self._user)


def _failed(problem: str, result: Result, fix: str) -> ProviderError:
    """Return the error for a program that failed; it blames the host's disk where the program does."""
    why = result.last_line.removeprefix("error ")
    if os.strerror(errno.ENOSPC).lower() in result.output.lower():
        problem, fix = f"{problem}: the host's disk is full", "free some space on the host"
    return ProviderError(problem, why=why, fix=fix)


def _resize(path: Path, size: int, *, full: bool) -> None:
    with path.open("r+b") as file:
        if full:
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            os.truncate(file.fileno(), size)


def copy_sparse(source: Path, target: Path, deadline: Deadline, tick: Callable[[], None]) -> None:
    """Copy a file with its holes, owner and mode; share blocks where the file system supports it.

    :raises OSError: reading or writing failed; :raises DeadlineExceeded: no time left.
    """
    with source.open("rb") as reading, target.open("xb") as writing:
        status = os.fstat(reading.fileno())
        os.fchmod(writing.fileno(), stat.S_IMODE(status.st_mode))
        if os.geteuid() == 0:
            os.fchown(writing.fileno(), status.st_uid, status.st_gid)
        try:
            fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
            return
        except OSError:
            pass  # not supported by this file system
        os.truncate(writing.fileno(), status.st_size)
        for start, end in data_ranges(reading.fileno(), status.st_size):
            for at in range(start, end, _CHUNK):
                if deadline.expired:
                    raise DeadlineExceeded("Copying a disk did not end in time", fix="try again with more time")
                tick()
                os.pwrite(writing.fileno(), os.pread(reading.fileno(), min(_CHUNK, end - at), at), at)


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each part of a file that is not a hole."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here
                return
            raise
        end = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        yield start, end
