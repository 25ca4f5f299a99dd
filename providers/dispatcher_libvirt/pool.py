"""Disks of machines on another host: volumes of a libvirt storage pool.

    NAME.data-N.raw             a data disk; NAME.data-N.ok marks it as complete, the highest complete one counts
    NAME.root-FINGERPRINT.qcow2 the overlay of one base image
    NAME.kept-FINGERPRINT.raw   the data disk from before a change of the image
    NAME.seed.iso               the cloud-init disk

Everything that needs access to a file system happens here, on a copy, in the same sandbox as for local disks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
from dispatcher_libvirt import cloud_init, data, handles
from dispatcher_libvirt.connection import Backend, Tick
from dispatcher_libvirt.disks import Disks
from dispatcher_libvirt.images import Reader
from dispatcher_libvirt.options import SMALLEST_DISK, Options, disk_of, options_of
from dispatcher_libvirt.storage import Created, Storage
from dispatcher_libvirt.volumes import Volumes

_ROOT = re.compile(r"root-([0-9a-f]{12})\.qcow2")
_DATA = re.compile(r"data-(\d+)\.raw")
_CLEANUP = 30.0
_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


class PoolStorage(Storage):
    """Volumes of a storage pool."""

    def __init__(self, context: ProviderContext, options: Options, backend: Backend) -> None:
        self._volumes = Volumes(backend, options.pool)
        self._privileged = context.privileged
        self._scratch = Disks(context.state_dir / "scratch", own=None, privileged=context.privileged)

    def check(self, app: App, reader: Reader | None, deadline: Deadline, progress: Progress) -> None:
        options = options_of(app)
        progress("checking the image")
        for what, path in (("image", options.image), ("kernel", options.kernel), ("initrd", options.initrd)):
            if path is not None and self._volumes.fingerprint(path, deadline) is None:
                raise ProviderError(
                    f"The {what} {path} cannot be used",
                    why="no storage pool of the other host contains it",
                    fix="put it there, into the directory of an active pool (virsh pool-refresh POOL)",
                )

    def prepare(
        self, spec: AgentSpec, created: Created, deadline: Deadline, progress: Progress
    ) -> tuple[Path | None, Path]:
        name, options, size = spec.backend_name, options_of(spec.app), disk_of(spec.app)
        user = self._user(spec.uid, spec.gid)
        tick = lambda: progress("creating the disks", "on the other host")  # noqa: E731
        volumes = self._volumes.sizes(name, deadline)
        current = current_data(volumes)
        root = None
        if options.image is not None:
            root = self._root(spec, created, volumes, deadline, tick)
        if not current:
            with self._local(name) as disks:
                disks.create_data(name, size, user, full=False, deadline=deadline, tick=tick)
                created.data = True
                current = self._replace_data(name, disks.data(name), volumes, deadline, tick)
        elif volumes[current] < size:
            with self._local(name) as disks:
                self._fetch(name, current, disks.data(name), user, deadline, tick)
                disks.grow_data(name, size, user, full=False, deadline=deadline, tick=tick)
                current = self._replace_data(name, disks.data(name), volumes, deadline, tick)
        return root, self._volumes.path(f"{name}.{current}", deadline)

    def undo(self, name: str, created: Created, deadline: Deadline) -> None:
        try:
            self.remove_cloud_init(name, deadline)
            if created.data:
                self.remove(name, data=True, deadline=deadline)
            elif created.root is not None:
                self._volumes.delete(created.root.name, deadline)
        except DispatcherError as error:
            _log.warning("%s: cleanup after a failed start: %s", name, error)

    def write_cloud_init(self, spec: AgentSpec, files: dict[str, bytes], deadline: Deadline) -> Path:
        # On the other host's disk, for root and QEMU alone, until the machine is stopped.
        volume, image = f"{spec.backend_name}.seed.iso", cloud_init.iso_image(files)
        self._volumes.delete(volume, deadline)
        self._volumes.create(volume, len(image), deadline)
        self._volumes.upload_bytes(image, volume, deadline)
        return self._volumes.path(volume, deadline)

    def keep_cloud_init(self, handle: Handle, deadline: Deadline) -> None:
        """The disk exists until the machine is stopped."""

    def remove_cloud_init(self, name: str, deadline: Deadline) -> None:
        self._volumes.delete(f"{name}.seed.iso", deadline)

    def begin_log(self, spec: AgentSpec) -> Path | None:
        return None

    def remove(self, name: str, *, data: bool, deadline: Deadline) -> None:
        for suffix in self._volumes.sizes(name, deadline):
            if data or _ROOT.fullmatch(suffix):
                self._volumes.delete(f"{name}.{suffix}", deadline)

    def export_data(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        name, user, privileged = handle.name, self._user_of(handle), self._privileged
        current = current_data(self._volumes.sizes(name, deadline))
        if not current:
            raise data.no_data_disk(name)
        with self._local(name) as disks:
            tick = lambda: progress("exporting", "from the other host")  # noqa: E731
            self._fetch(name, current, disks.data(name), user, deadline, tick)
            data.export_data(
                disks, name, user, directory, privileged=privileged, deadline=deadline, progress=progress
            )

    def import_data(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        name, user = handle.name, self._user_of(handle)
        volumes = self._volumes.sizes(name, deadline)
        size = max(handles.disk_size_of(handle), volumes.get(current_data(volumes), SMALLEST_DISK))
        with self._local(name) as disks:
            data.import_data(disks, name, user, directory, size, deadline=deadline, progress=progress)
            tick = lambda: progress("importing", "to the other host")  # noqa: E731
            self._replace_data(name, disks.data(name), volumes, deadline, tick)

    def _root(
        self, spec: AgentSpec, created: Created, volumes: dict[str, int], deadline: Deadline, tick: Tick
    ) -> Path:
        name, options = spec.backend_name, options_of(spec.app)
        assert options.image is not None
        found = self._volumes.fingerprint(options.image, deadline)
        if found is None:
            raise ProviderError(
                f"The image {options.image} is missing", fix="put it into a pool of the other host"
            )
        fingerprint, capacity = found
        suffix = f"root-{fingerprint}.qcow2"
        others = [match[1] for one in volumes if (match := _ROOT.fullmatch(one)) and one != suffix]
        current = current_data(volumes)
        if others and suffix not in volumes and current and options.snapshots:
            self._volumes.clone(f"{name}.{current}", f"{name}.kept-{others[0]}.raw", deadline, tick)
        if options.root == "fresh" and suffix in volumes:
            self._volumes.delete(f"{name}.{suffix}", deadline)
        if suffix not in volumes or options.root == "fresh":
            backing = (options.image, options.format)
            self._volumes.create(f"{name}.{suffix}", capacity, deadline, form="qcow2", backing=backing)
            created.root = Path(f"{name}.{suffix}")
        for other in others[options.snapshots :]:
            self._volumes.delete(f"{name}.root-{other}.qcow2", deadline)
        return self._volumes.path(f"{name}.{suffix}", deadline)

    def _replace_data(
        self, name: str, source: Path, volumes: dict[str, int], deadline: Deadline, tick: Tick
    ) -> str:
        """Send a local file as the data disk and return its name; remove the old one when it is complete."""
        numbers = [int(match[1]) for one in volumes if (match := _DATA.fullmatch(one))]
        number = max(numbers, default=0) + 1
        new = f"data-{number}"
        self._volumes.create(f"{name}.{new}.raw", source.stat().st_size, deadline)
        try:
            self._volumes.upload(source, f"{name}.{new}.raw", deadline, tick)
            self._volumes.create(f"{name}.{new}.ok", 1, deadline)
        except BaseException:
            self._volumes.delete(f"{name}.{new}.raw", Deadline(_CLEANUP))
            raise
        for old in numbers:
            self._volumes.delete(f"{name}.data-{old}.ok", deadline)
            self._volumes.delete(f"{name}.data-{old}.raw", deadline)
        return f"{new}.raw"

    def _fetch(
        self, name: str, current: str, target: Path, user: tuple[int, int] | None, deadline: Deadline, tick: Tick
    ) -> None:
        self._volumes.download(f"{name}.{current}", target, deadline, tick)
        self._scratch.restore_owner(name, user)

    @contextmanager
    def _local(self, name: str) -> Iterator[Disks]:
        """Yield temporary local disks."""
        self._scratch.remove(name, data=True)
        self._scratch.make_directory(name)
        try:
            yield self._scratch
        finally:
            self._scratch.remove(name, data=True)

    def _user(self, uid: int, gid: int) -> tuple[int, int] | None:
        return (uid, gid) if self._privileged else None

    def _user_of(self, handle: Handle) -> tuple[int, int] | None:
        return handles.user_of(handle) if self._privileged else None


def current_data(volumes: Iterable[str]) -> str:
    """Return the name of the data disk among a machine's volumes: the newest complete one, "" without one."""
    names = set(volumes)
    numbers = [int(match[1]) for name in names if (match := _DATA.fullmatch(name))]
    complete = [number for number in numbers if f"data-{number}.ok" in names]
    return f"data-{max(complete)}.raw" if complete else ""
