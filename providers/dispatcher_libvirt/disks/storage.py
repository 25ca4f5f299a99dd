"""Storage of machines' disks: the interface, and its implementation with files of this host.

Every agent has a directory that belongs to the manager (so that no other user can replace a name in it), with
files that belong to the machine's host user:

    data.raw                 the data disk
    root-FINGERPRINT.qcow2   the overlay of one base image
    snapshots/               the data disk from before each change of the image
    booted                   the fingerprint of the last boot files

`pool` implements the interface with volumes of another host's storage pool.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from dispatcher.plugin import (
    AgentSpec,
    App,
    Deadline,
    Handle,
    Progress,
    ProviderContext,
    ProviderError,
    remove_tree,
)
from dispatcher_libvirt.disks import cloud_init, images
from dispatcher_libvirt.disks.data import DataDisk, User, copy_sparse
from dispatcher_libvirt.disks.images import Images, Reader
from dispatcher_libvirt.domain_xml import disk_size_of, user_of
from dispatcher_libvirt.errors import disk_errors
from dispatcher_libvirt.options import SMALLEST_DISK, Options, disk_of, options_of

#: Actions that remove what a start in progress has created, the newest last.
Undo = list[Callable[[Deadline], None]]


class Storage(ABC):
    """The disks of one installation's machines.  Paths are those of QEMU's host."""

    @abstractmethod
    def check(self, app: App, reader: Reader | None, deadline: Deadline, progress: Progress) -> None:
        """Check the files that an app boots from.

        :param reader: the user that QEMU reads them as, None where libvirt makes them readable.
        :raises ProviderError: one is missing, unreadable, damaged or of another format.
        """

    @abstractmethod
    def prepare(
        self, spec: AgentSpec, undo: Undo, deadline: Deadline, progress: Progress
    ) -> tuple[Path | None, Path]:
        """Create, grow or repair the disks of an absent machine; return root and data disk."""

    @abstractmethod
    def write_cloud_init(self, spec: AgentSpec, image: bytes, deadline: Deadline) -> Path:
        """Write a machine's cloud-init disk, which is removed when the machine is stopped."""

    @abstractmethod
    def keep_cloud_init(self, handle: Handle, deadline: Deadline) -> None:
        """Provide a disk in place of a lost cloud-init disk for a machine that wakes up."""

    @abstractmethod
    def remove_cloud_init(self, name: str, deadline: Deadline) -> None:
        """Remove a cloud-init disk.  Absent is success."""

    @abstractmethod
    def remove(self, name: str, *, data: bool, deadline: Deadline) -> None:
        """Remove a machine's disks, with `data` the data disk too.  Absent is success."""

    @abstractmethod
    def export_data(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        """See `Provider.export_data`; the machine does not run."""

    @abstractmethod
    def import_data(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        """See `Provider.import_data`; the machine does not run."""


class LocalStorage(Storage):
    """Files of this host."""

    def __init__(self, context: ProviderContext, options: Options) -> None:
        self._context = context
        self.top = options.storage or context.state_dir / "machines"
        self._images = Images()
        self._cloud_init_lock = threading.Lock()

    def check(self, app: App, reader: Reader | None, deadline: Deadline, progress: Progress) -> None:
        self._make_top()
        if reader is not None and (command := images.passable(self.top / "x", reader)):
            raise ProviderError(
                f"Machines cannot reach their disks in {self.top}",
                why=f"their QEMU runs as user {reader.uid}, and a parent directory is not passable",
                fix=command,
            )
        self._images.check(options_of(app), reader, deadline, partial(progress, "checking the image"))

    def prepare(
        self, spec: AgentSpec, undo: Undo, deadline: Deadline, progress: Progress
    ) -> tuple[Path | None, Path]:
        user, options = self._user(spec.uid, spec.gid), options_of(spec.app)
        directory = self.top / spec.backend_name
        if self.make_directory(directory):
            undo.append(lambda deadline: remove_tree(directory, deadline=deadline))
        tick = partial(progress, "creating the disks")
        data = DataDisk(directory / "data.raw", user, deadline, tick)
        exists = data.path.exists()
        if exists:
            data.restore_owner()
        base, boots = self._images.check(options, None, deadline, tick)
        marker = directory / "booted"
        before = marker.read_text(encoding="ascii") if marker.exists() else ""
        if exists and before not in {"", boots}:
            with disk_errors("taking a snapshot", directory):
                _snapshot(data.path, before, options.snapshots, deadline, tick)
        root = directory / f"root-{base}.qcow2"
        if options.image is not None:
            if options.root == "fresh":
                root.unlink(missing_ok=True)
            if not root.exists():
                with disk_errors("creating an overlay", directory):
                    images.create_overlay(root, options.image, options.format, user)
                undo.append(lambda _: root.unlink(missing_ok=True))
            prune((path for path in directory.glob("root-*.qcow2") if path != root), options.snapshots)
        with disk_errors("creating a machine's directory", directory):
            temporary = directory / f".{secrets.token_hex(4)}.new"
            temporary.write_text(boots, encoding="ascii")
            temporary.replace(marker)
        size, full = disk_of(spec.app), options.data_allocation == "full"
        if exists:
            data.grow(size, full=full)
            data.repair()
        else:
            data.create(size, full=full)
            undo.append(lambda _: data.path.unlink(missing_ok=True))
        return root if options.image else None, data.path

    def write_cloud_init(self, spec: AgentSpec, image: bytes, deadline: Deadline) -> Path:
        with self._cloud_init_lock:
            path = self._cloud_init_path(spec.backend_name)
            cloud_init.write_image(path, image, self._user(spec.uid, spec.gid))
        return path

    def keep_cloud_init(self, handle: Handle, deadline: Deadline) -> None:
        with self._cloud_init_lock:
            path = self._cloud_init_path(handle.name)
            if not path.exists():  # the guest has read it at boot
                cloud_init.write_image(path, bytes(64 * 1024), self._user(*user_of(handle)))

    def remove_cloud_init(self, name: str, deadline: Deadline) -> None:
        with self._cloud_init_lock:
            path = self._cloud_init_path(name)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: other machines have one
                path.parent.rmdir()

    def remove(self, name: str, *, data: bool, deadline: Deadline) -> None:
        directory = self.top / name
        with disk_errors("removing a machine's disks", directory):
            if not directory.exists():
                return
            if data:
                remove_tree(directory, deadline=deadline)
                return
            for pattern in ("root-*.qcow2", "booted", ".*.new"):
                for path in directory.glob(pattern):
                    path.unlink(missing_ok=True)
            if not any(directory.iterdir()):
                directory.rmdir()

    def export_data(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        self._disk(handle, deadline, partial(progress, "exporting")).export_to(directory, progress)

    def import_data(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        disk = self._disk(handle, deadline, partial(progress, "importing"))
        known = disk.path.stat().st_size if disk.path.exists() else SMALLEST_DISK
        self.make_directory(disk.path.parent)
        disk.import_from(directory, max(disk_size_of(handle), known))

    def make_directory(self, directory: Path) -> bool:
        """Create a machine's directory: passable for QEMU, not readable; False where it exists."""
        self._make_top()
        with disk_errors("creating a machine's directory", self.top):
            try:
                directory.mkdir()
            except FileExistsError:
                return False
            directory.chmod(0o711)
            return True

    def _make_top(self) -> None:
        with disk_errors("creating the directory of machines' disks", self.top):
            self.top.mkdir(mode=0o711, parents=True, exist_ok=True)
            own = self._context.state_dir
            for directory in (own, self.top) if self.top.is_relative_to(own) else (self.top,):
                if directory.stat().st_mode & 0o011 != 0o011:
                    directory.chmod(0o711)

    def _disk(self, handle: Handle, deadline: Deadline, tick: Callable[[], None]) -> DataDisk:
        return DataDisk(self.top / handle.name / "data.raw", self._user(*user_of(handle)), deadline, tick)

    def _user(self, uid: int, gid: int) -> User:
        return (uid, gid) if self._context.privileged else None

    def _cloud_init_path(self, name: str) -> Path:
        return cloud_init.memory_directory(self._context.installation, self._context.run_dir) / f"{name}.iso"


def _snapshot(data: Path, fingerprint: str, keep: int, deadline: Deadline, tick: Callable[[], None]) -> None:
    """Copy a data disk under the fingerprint of its boot files; keep the newest `keep` snapshots."""
    folder = data.parent / "snapshots"
    if keep:
        folder.mkdir(mode=0o700, exist_ok=True)
        temporary = folder / f".{secrets.token_hex(4)}.new"
        try:
            copy_sparse(data, temporary, deadline, tick)
            temporary.replace(folder / f"data-{fingerprint}.raw")
        finally:
            temporary.unlink(missing_ok=True)
    prune(folder.glob("data-*.raw"), keep)


def prune(paths: Iterable[Path], keep: int) -> None:
    """Remove all files but the newest `keep`."""
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)[keep:]:
        path.unlink()
