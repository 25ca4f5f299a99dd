"""Disks of machines as files of this host: create, grow, check, copy.

Every agent has a directory that belongs to the manager (so that no other user can replace a name in it), with
files that belong to the machine's host user:

    data.raw                 the data disk: ext4 without partitions
    root-FINGERPRINT.qcow2   the overlay of one base image
    snapshots/               the data disk from before each change of the image
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dispatcher.plugin import Deadline, DeadlineExceeded, ProviderError, printable
from dispatcher_libvirt import sandbox
from dispatcher_libvirt.sandbox import Bind, Result, Tick

DATA = "data.raw"
SNAPSHOTS = "snapshots"
BOOTED = "booted"  # file with the fingerprint of the last boot files
IMAGE = "/image"  # where tools in the sandbox see the disk
_ROOT = re.compile(r"root-([0-9a-f]{12})\.qcow2")
_FICLONE = 0x40049409
_CHUNK = 8 << 20
_BYTES_PER_INODE = 8192
_LABEL = "dispatcher-data"

User = tuple[int, int] | None


class Disks:
    """The disks of all agents of one installation, below one directory.

    :param own: the provider's own directory, when it contains `top`; :param privileged: this is root, and tools
        run as the agent's user.
    """

    def __init__(self, top: Path, *, own: Path | None, privileged: bool) -> None:
        self.top = top
        self._own_directory = own
        self._privileged = privileged

    def prepare(self) -> None:
        """Create the top directory: passable for QEMU, not readable."""
        with self.errors("creating the directory of machines' disks"):
            self.top.mkdir(mode=0o711, parents=True, exist_ok=True)
            for directory in (self._own_directory, self.top):
                if directory is not None and directory.stat().st_mode & 0o011 != 0o011:
                    directory.chmod(0o711)

    # -- directories -------------------------------------------------------------------------------------

    def directory(self, name: str) -> Path:
        """Return the directory of an agent, by its backend name."""
        return self.top / name

    def data(self, name: str) -> Path:
        """Return the data disk of an agent."""
        return self.directory(name) / DATA

    def make_directory(self, name: str) -> bool:
        """Create an agent's directory; False where it exists."""
        self.prepare()
        with self.errors("creating a machine's directory"):
            try:
                self.directory(name).mkdir(mode=0o711)
            except FileExistsError:
                return False
            self.directory(name).chmod(0o711)
            return True

    def remove(self, name: str, *, data: bool) -> None:
        """Remove an agent's disks, with `data` the data disk too.  Absent is success."""
        directory = self.directory(name)
        with self.errors("removing a machine's disks"):
            if data:
                if directory.exists():
                    shutil.rmtree(directory)
                return
            for path in (*self.roots(name).values(), directory / BOOTED, *directory.glob(".*.new")):
                path.unlink(missing_ok=True)
            if directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()

    def roots(self, name: str) -> dict[str, Path]:
        """Return an agent's overlays by the fingerprint of their base image."""
        found = {}
        directory = self.directory(name)
        for path in directory.iterdir() if directory.is_dir() else ():
            if match := _ROOT.fullmatch(path.name):
                found[match[1]] = path
        return found

    # -- the data disk -----------------------------------------------------------------------------------

    def create_data(self, name: str, size: int, user: User, *, full: bool, deadline: Deadline, tick: Tick) -> None:
        """Create an empty data disk.

        :raises ProviderError: no space, or a tool is missing.
        """
        with self._replacing(self.data(name), user) as path:
            with self.errors("creating a data disk"):
                _resize(path, size, full=full)
            self._format(path, user, None, deadline, tick, inodes=0)

    def restore_owner(self, name: str, user: User) -> None:
        """Give the data disk back to its user, where libvirt was stopped before it could."""
        with self.errors("looking at a data disk"):
            self._own(self.data(name), user)

    def grow_data(self, name: str, size: int, user: User, *, full: bool, deadline: Deadline, tick: Tick) -> None:
        """Enlarge an existing data disk and keep its content; a larger one stays as it is."""
        path = self.data(name)
        before = path.stat().st_size
        if before >= size:
            return
        self.repair(name, user, deadline=deadline, tick=tick, thorough=True)
        with self.errors("growing a data disk"):
            _resize(path, size, full=full)
        result = self._tool(["resize2fs", IMAGE], path, user, deadline, tick)
        if result.code:
            os.truncate(path, before)
            raise ProviderError(
                f"The data disk of {printable(name)} cannot grow", why=result.last_line, fix=f"check {path}"
            )

    def repair(self, name: str, user: User, *, deadline: Deadline, tick: Tick, thorough: bool = False) -> None:
        """Replay the data disk's journal and repair it after a power cut; quick after a clean shutdown.

        :raises ProviderError: it is beyond repair.
        """
        path = self.data(name)
        force = ["-f"] if thorough else []
        result = self._tool(["e2fsck", "-p", *force, IMAGE], path, user, deadline, tick)
        if result.code & ~3:
            result = self._tool(["e2fsck", "-y", "-f", IMAGE], path, user, deadline, tick)
        if result.code & ~3:
            raise ProviderError(
                f"The data disk of {printable(name)} is damaged",
                why=result.last_line,
                fix=f"check it with e2fsck ({path}), restore a snapshot, or reset the agent's data",
            )

    def fill_data(
        self, name: str, source: Path, size: int, user: User, *, files: int, deadline: Deadline, tick: Tick
    ) -> None:
        """Replace the data disk by a new one with a copy of `source`; the old one stays until that is complete.

        :param files: number of files and directories.
        :raises ProviderError: it does not fit, or is not readable.
        """
        with self._replacing(self.data(name), user) as path:
            with self.errors("creating a data disk"):
                os.truncate(path, size)
            self._format(path, user, source, deadline, tick, inodes=files + files // 4 + 1024)

    # -- overlays and snapshots --------------------------------------------------------------------------

    def create_root(self, name: str, fingerprint: str, base: Path, form: str, user: User) -> Path:
        """Create the overlay of a base image, or reuse it."""
        path = self.directory(name) / f"root-{fingerprint}.qcow2"
        if path.exists():
            return path
        temporary = path.with_name(f".{secrets.token_hex(4)}.new")
        command = [sandbox.tool("qemu-img"), "create", "-q", "-f", "qcow2"]
        command += ["-b", str(base), "-F", form, str(temporary)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            if done.returncode and os.strerror(errno.ENOSPC).lower() in done.stderr.lower():
                with self.errors("creating an overlay"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary.parent))
            if done.returncode:
                raise ProviderError(
                    f"Cannot create an overlay of {base}",
                    why=" ".join(done.stderr.split())[-400:],
                    fix="check that the disk has space, and that the image and `format` are right",
                )
            with self.errors("creating an overlay"):
                self._own(temporary, user)
                temporary.rename(path)
        except subprocess.TimeoutExpired as error:
            raise DeadlineExceeded(f"Creating an overlay of {base} took too long") from error
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def prune_roots(self, name: str, current: str, keep: int) -> None:
        """Remove all overlays but the current one and the newest `keep` others."""
        others = [path for fingerprint, path in self.roots(name).items() if fingerprint != current]
        for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[keep:]:
            path.unlink()

    def snapshot(self, name: str, fingerprint: str, keep: int, *, deadline: Deadline, tick: Tick) -> None:
        """Copy the data disk under the fingerprint of its boot files; keep the newest `keep` snapshots."""
        folder = self.directory(name) / SNAPSHOTS
        with self.errors("taking a snapshot"):
            if keep:
                folder.mkdir(mode=0o700, exist_ok=True)
                target = folder / f"data-{fingerprint}.raw"
                temporary = folder / f".{secrets.token_hex(4)}.new"
                try:
                    copy_sparse(self.data(name), temporary, deadline, tick)
                    temporary.replace(target)
                finally:
                    temporary.unlink(missing_ok=True)
            kept = sorted(folder.glob("data-*.raw"), key=lambda path: path.stat().st_mtime, reverse=True)
            for path in kept[keep:]:
                path.unlink()

    # -- parts -------------------------------------------------------------------------------------------

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Translate an OSError into a ProviderError with a remedy."""
        try:
            yield
        except OSError as error:
            full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
            raise ProviderError(
                f"{'The disk is full' if full else 'The host refused'} while {what}",
                why=f"{error.strerror or error} ({error.filename or self.top})",
                fix=f"free some space at {self.top}" if full else f"check the permissions of {self.top}",
            ) from error

    @contextmanager
    def _replacing(self, target: Path, user: User) -> Iterator[Path]:
        """Yield an empty file that replaces `target` on success, and is removed otherwise."""
        path = target.with_name(f".{secrets.token_hex(4)}.new")
        try:
            with self.errors("creating a disk"):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                self._own(path, user)
            yield path
            with self.errors("creating a disk"):
                path.rename(target)
        finally:
            path.unlink(missing_ok=True)

    def _own(self, path: Path, user: User) -> None:
        path.chmod(0o600)
        if self._privileged and user is not None:
            os.chown(path, *user, follow_symlinks=False)

    def _format(
        self, path: Path, user: User, source: Path | None, deadline: Deadline, tick: Tick, *, inodes: int
    ) -> None:
        owner = user or (os.geteuid(), os.getegid())
        # Whatever the disk's size: blocks for the longest symbolic link, inodes with full times.
        argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-L", _LABEL]
        argv += ["-N", str(max(inodes, path.stat().st_size // _BYTES_PER_INODE))]
        argv += ["-E", f"root_owner={owner[0]}:{owner[1]},lazy_itable_init=1,lazy_journal_init=1"]
        binds = []
        if source is not None:
            argv += ["-d", "/source"]
            binds = [Bind(source=source, target="/source")]
        result = self._tool([*argv, IMAGE], path, user, deadline, tick, binds=binds, read_all=source is not None)
        if result.code:
            small = "could not allocate" in result.output.lower() or "no free space" in result.output.lower()
            raise ProviderError(
                "The data does not fit on the data disk" if small else "The data disk cannot be created",
                why=result.last_line,
                fix="raise the app's disk limit" if small else "check that the host's disk has space",
            )
        # Only e2fsck needs this directory, and creates it again by itself.
        debugfs = sandbox.tool("debugfs")
        self._tool([debugfs, "-w", "-R", "rmdir lost+found", IMAGE], path, user, deadline, tick)
        if source is not None:
            program, more = sandbox.python("ext4_tool.py")
            argv = [*program, "times", IMAGE, "/source", debugfs]
            result = self._tool(argv, path, user, deadline, tick, binds=[*binds, *more], read_all=True)
            if result.code:
                raise ProviderError(
                    "The times of files cannot be written to the data disk",
                    why=result.last_line.removeprefix("error "),
                    fix="check that the directory's files are readable, and that the host's disk has space",
                )

    def _tool(
        self,
        argv: list[str],
        path: Path,
        user: User,
        deadline: Deadline,
        tick: Tick,
        *,
        binds: list[Bind] | None = None,
        read_all: bool = False,
    ) -> Result:
        user = user if self._privileged else None
        if read_all and user is not None:
            os.chown(path, 0, 0)
        try:
            return sandbox.run(
                [argv[0] if "/" in argv[0] else sandbox.tool(argv[0]), *argv[1:]],
                binds=[Bind(source=path, target=IMAGE, writable=True), *(binds or [])],
                user=user,
                deadline=deadline,
                tick=tick,
                read_all=read_all,
            )
        finally:
            if read_all and user is not None:
                os.chown(path, *user)


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
        at = 0
        while at < status.st_size:
            try:
                at = os.lseek(reading.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole from here
                    return
                raise
            end = os.lseek(reading.fileno(), at, os.SEEK_HOLE)
            while at < end:
                if deadline.expired:
                    raise DeadlineExceeded("Copying a disk did not end in time", fix="try again with more time")
                tick()
                block = os.pread(reading.fileno(), min(_CHUNK, end - at), at)
                os.pwrite(writing.fileno(), block, at)
                at += len(block)
