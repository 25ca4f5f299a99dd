"""Storage of machines' disks: the interface, and its implementation with files of this host.

`pool` implements it with volumes of another host's storage pool.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dispatcher.plugin import (
    AgentSpec,
    App,
    Deadline,
    DispatcherError,
    Handle,
    Progress,
    ProviderContext,
    ProviderError,
)
from dispatcher_libvirt import cloud_init, data, handles, images, logs
from dispatcher_libvirt.disks import BOOTED, Disks, User
from dispatcher_libvirt.images import Images, Reader
from dispatcher_libvirt.options import SMALLEST_DISK, Options, disk_of, options_of

_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


@dataclass
class Created:
    """Files of a start in progress; a failure removes them again."""

    directory: bool = False
    data: bool = False
    root: Path | None = None


class Storage(Protocol):
    """The disks of one installation's machines.  Paths are those of QEMU's host."""

    def check(self, app: App, reader: Reader | None, deadline: Deadline, progress: Progress) -> None:
        """Check the files that an app boots from.

        :param reader: the user that QEMU reads them as, None where libvirt makes them readable.
        :raises ProviderError: one is missing, unreadable, damaged or of another format.
        """

    def prepare(
        self, spec: AgentSpec, created: Created, deadline: Deadline, progress: Progress
    ) -> tuple[Path | None, Path]:
        """Create, grow or repair the disks of an absent machine; return root and data disk."""

    def undo(self, name: str, created: Created, deadline: Deadline) -> None:
        """Remove the files of a failed start."""

    def write_cloud_init(self, spec: AgentSpec, files: dict[str, bytes], deadline: Deadline) -> Path:
        """Write a machine's cloud-init disk."""

    def keep_cloud_init(self, handle: Handle, deadline: Deadline) -> None:
        """Provide a disk in place of the cloud-init disk for a machine that wakes up."""

    def remove_cloud_init(self, name: str, deadline: Deadline) -> None:
        """Remove a cloud-init disk.  Absent is success."""

    def begin_log(self, spec: AgentSpec) -> Path | None:
        """Mark the start in the log; return the file for the console, None where there is none."""

    def remove(self, name: str, *, data: bool, deadline: Deadline) -> None:
        """Remove a machine's disks, with `data` the data disk too.  Absent is success."""

    def export_data(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        """See `Provider.export_data`; the machine does not run."""

    def import_data(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        """See `Provider.import_data`; the machine does not run."""


class LocalStorage(Storage):
    """Files of this host."""

    def __init__(self, context: ProviderContext, options: Options) -> None:
        self._context = context
        self.disks = Disks(
            options.storage or context.state_dir / "machines",
            own=None if options.storage else context.state_dir,
            privileged=context.privileged,
        )
        self._images = Images()
        self._cloud_init_lock = threading.Lock()

    def check(self, app: App, reader: Reader | None, deadline: Deadline, progress: Progress) -> None:
        options = options_of(app)
        self.disks.prepare()
        if reader is not None and (command := images.passable(self.disks.top / "x", reader)):
            raise ProviderError(
                f"Machines cannot reach their disks in {self.disks.top}",
                why=f"their QEMU runs as user {reader.uid}, and a parent directory is not passable",
                fix=command,
            )
        self._images.check(options, reader, deadline=deadline, tick=lambda: progress("checking the image"))

    def prepare(
        self, spec: AgentSpec, created: Created, deadline: Deadline, progress: Progress
    ) -> tuple[Path | None, Path]:
        name = spec.backend_name
        user = (spec.uid, spec.gid) if self._context.privileged else None
        created.directory = self.disks.make_directory(name)
        root = self._root(spec, user, created, deadline, progress)
        self._data(spec, user, created, deadline, progress)
        return root, self.disks.data(name)

    def undo(self, name: str, created: Created, deadline: Deadline) -> None:
        try:
            self.remove_cloud_init(name, deadline)
            if created.root is not None:
                created.root.unlink(missing_ok=True)
            if created.data or created.directory:
                self.disks.remove(name, data=True)
        except (DispatcherError, OSError) as error:
            _log.warning("%s: cleanup after a failed start: %s", name, error)

    def write_cloud_init(self, spec: AgentSpec, files: dict[str, bytes], deadline: Deadline) -> Path:
        with self._cloud_init_lock:
            path = self._cloud_init_path(spec.backend_name)
            owner = (spec.uid, spec.gid) if self._context.privileged else None
            cloud_init.write_image(path, cloud_init.iso_image(files), owner)
        return path

    def keep_cloud_init(self, handle: Handle, deadline: Deadline) -> None:
        with self._cloud_init_lock:
            cloud_init.write_placeholder(self._cloud_init_path(handle.name), self._user(handle))

    def begin_log(self, spec: AgentSpec) -> Path | None:
        try:
            logs.begin(spec.log_dir)
        except OSError as error:
            raise ProviderError(
                f"The log in {spec.log_dir} is not writable",
                why=error.strerror or str(error),
                fix="check that the disk has space and that the directory belongs to the manager",
            ) from error
        return spec.log_dir / logs.NAME

    def remove_cloud_init(self, name: str, deadline: Deadline) -> None:
        with self._cloud_init_lock:
            path = self._cloud_init_path(name)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: other machines have one
                path.parent.rmdir()

    def remove(self, name: str, *, data: bool, deadline: Deadline) -> None:
        self.disks.remove(name, data=data)

    def export_data(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        name, user, privileged = handle.name, self._user(handle), self._context.privileged
        if self.disks.data(name).exists():
            self.disks.restore_owner(name, user)
        data.export_data(
            self.disks, name, user, directory, privileged=privileged, deadline=deadline, progress=progress
        )

    def import_data(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        known = self.disks.data(handle.name)
        size = max(handles.disk_size_of(handle), known.stat().st_size if known.exists() else SMALLEST_DISK)
        user = self._user(handle)
        data.import_data(self.disks, handle.name, user, directory, size, deadline=deadline, progress=progress)

    def _user(self, handle: Handle) -> User:
        return handles.user_of(handle) if self._context.privileged else None

    def _cloud_init_path(self, name: str) -> Path:
        return cloud_init.memory_directory(self._context.installation, self._context.run_dir) / f"{name}.iso"

    def _data(self, spec: AgentSpec, user: User, created: Created, deadline: Deadline, progress: Progress) -> None:
        name, size = spec.backend_name, disk_of(spec.app)
        full = options_of(spec.app).data_allocation == "full"
        tick = lambda: progress("creating the disks", "data")  # noqa: E731
        if not self.disks.data(name).exists():
            self.disks.create_data(name, size, user, full=full, deadline=deadline, tick=tick)
            created.data = True
        else:
            self.disks.restore_owner(name, user)
            self.disks.grow_data(name, size, user, full=full, deadline=deadline, tick=tick)
            self.disks.repair(name, user, deadline=deadline, tick=tick)

    def _root(
        self, spec: AgentSpec, user: User, created: Created, deadline: Deadline, progress: Progress
    ) -> Path | None:
        """Return the overlay of the app's base image; snapshot the data disk before a change of it."""
        name, options = spec.backend_name, options_of(spec.app)
        tick = lambda: progress("creating the disks", "snapshot")  # noqa: E731
        base, boots = self._images.check(options, None, deadline=deadline, tick=tick)
        marker = self.disks.directory(name) / BOOTED
        before = marker.read_text(encoding="ascii").strip() if marker.exists() else ""
        if before and before != boots and self.disks.data(name).exists():
            self.disks.restore_owner(name, user)
            self.disks.snapshot(name, before, options.snapshots, deadline=deadline, tick=tick)
        path = None
        if options.image is not None:
            known = self.disks.roots(name)
            if options.root == "fresh" and base in known:
                known.pop(base).unlink()
            path = self.disks.create_root(name, base, options.image, options.format, user)
            if base not in known:
                created.root = path
            self.disks.prune_roots(name, base, options.snapshots)
        with self.disks.errors("creating a machine's directory"):
            temporary = marker.with_name(f".{secrets.token_hex(4)}.new")
            temporary.write_text(boots, encoding="ascii")
            temporary.replace(marker)
        return path
