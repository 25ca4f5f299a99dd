"""Disks of machines on another host: volumes of a libvirt storage pool.

    NAME.data-N.raw             a data disk; NAME.data-N.ok marks it as complete, the highest complete one counts
    NAME.root-FINGERPRINT.qcow2 the overlay of one base image
    NAME.kept-FINGERPRINT.raw   the data disk from before a change of the image
    NAME.seed.iso               the cloud-init disk

Everything that needs access to a file system happens here, on a copy, in the same sandbox as for local disks.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import libvirt
from lxml import etree

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
from dispatcher_libvirt.connection import Backend, Lane, Tick
from dispatcher_libvirt.disks.data import DataDisk, data_ranges
from dispatcher_libvirt.disks.images import Reader
from dispatcher_libvirt.disks.storage import Storage, Undo
from dispatcher_libvirt.domain_xml import disk_size_of, user_of
from dispatcher_libvirt.errors import disk_errors
from dispatcher_libvirt.options import SMALLEST_DISK, Options, disk_of, options_of
from dispatcher_libvirt.xml_input import element, parse_xml

_ROOT = re.compile(r"root-([0-9a-f]{12})\.qcow2")
_DATA = re.compile(r"data-(\d+)\.raw")
_CLEANUP = 30.0
_BLOCK = 256 * 1024
_AT_HOLE = -3  # result of virStream.recvFlags
_NO_VOLUME = libvirt.VIR_ERR_NO_STORAGE_VOL

_T = TypeVar("_T")


class Stopped(Exception):
    """The caller of a transfer no longer waits for it."""


class Volumes:
    """The volumes of one storage pool, and their transfer over libvirt streams, with holes."""

    def __init__(self, backend: Backend, pool: str) -> None:
        self._backend, self._name = backend, pool

    def sizes(self, machine: str, deadline: Deadline) -> dict[str, int]:
        """Return sizes in bytes of a machine's volumes, by their names without the machine's name and dot."""
        prefix = f"{machine}."

        def look(pool: libvirt.virStoragePool) -> dict[str, int]:
            pool.refresh()
            found = {volume.name(): volume.info()[1] for volume in pool.listAllVolumes()}
            return {name.removeprefix(prefix): size for name, size in found.items() if name.startswith(prefix)}

        return self._in_pool(look, f"looking for the disks of {machine}", deadline, Lane.QUERY)

    def path(self, name: str, deadline: Deadline) -> Path:
        """Return the path of a volume on the other host."""

        def look(pool: libvirt.virStoragePool) -> Path:
            return Path(pool.storageVolLookupByName(name).path())

        return self._in_pool(look, f"looking for {name}", deadline, Lane.QUERY)

    def fingerprint(self, path: Path, deadline: Deadline) -> tuple[str, int] | None:
        """Return fingerprint and size in bytes of a file in any pool of the other host, None where none has it."""

        def look(connection: libvirt.virConnect) -> tuple[str, int] | None:
            try:
                root = parse_xml(connection.storageVolLookupByPath(str(path)).XMLDesc())
            except libvirt.libvirtError as error:
                if error.get_error_code() == _NO_VOLUME:
                    return None
                raise
            capacity = int(root.findtext("capacity") or 0)
            changed = root.findtext("target/timestamps/mtime") or ""
            return hashlib.sha256(f"{path} {capacity} {changed}".encode()).hexdigest()[:12], capacity

        return self._backend.call(look, what=f"looking at {path}", deadline=deadline)

    def create(self, name: str, size: int, deadline: Deadline, backing: tuple[Path, str] | None = None) -> None:
        """Create a sparse volume; with `backing`, an overlay of that file with its format."""
        text = volume_xml(name, size, backing)
        self._in_pool(lambda pool: pool.createXML(text), f"creating the disk {name}", deadline)

    def delete(self, name: str, deadline: Deadline) -> None:
        """Delete a volume.  Absent is success."""

        def delete(pool: libvirt.virStoragePool) -> None:
            try:
                pool.storageVolLookupByName(name).delete()
            except libvirt.libvirtError as error:
                if error.get_error_code() != _NO_VOLUME:
                    raise

        self._in_pool(delete, f"removing the disk {name}", deadline)

    def clone(self, source: str, target: str, deadline: Deadline, tick: Tick) -> None:
        """Copy a volume on the other host, in place of an existing one."""
        self.delete(target, deadline)

        def clone(pool: libvirt.virStoragePool) -> None:
            volume = pool.storageVolLookupByName(source)
            pool.createXMLFrom(volume_xml(target, volume.info()[1]), volume)

        self._in_pool(clone, "taking a snapshot", deadline, tick=tick)

    def upload(self, fd: int, name: str, deadline: Deadline, tick: Tick) -> None:
        """Send a file to a volume."""
        size = os.fstat(fd).st_size

        def send(volume: libvirt.virStorageVol, stream: libvirt.virStream, check: Tick) -> None:
            volume.upload(stream, 0, size, libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM)
            at = 0
            for start, end in (*data_ranges(fd, size), (size, size)):
                if start > at:
                    stream.sendHole(start - at)
                for offset in range(start, end, _BLOCK):
                    check()
                    block = os.pread(fd, min(_BLOCK, end - offset), offset)
                    while block:
                        block = block[int(stream.send(block)) :]
                at = end

        self._transfer(send, name, "sending a disk", deadline, tick)

    def download(self, name: str, target: Path, deadline: Deadline, tick: Tick) -> None:
        """Receive a volume into a new file, mode 0600."""

        def receive(volume: libvirt.virStorageVol, stream: libvirt.virStream, check: Tick) -> None:
            size = volume.info()[1]
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.truncate(size)
                volume.download(stream, 0, size, libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM)
                while block := stream.recvFlags(_BLOCK, libvirt.VIR_STREAM_RECV_STOP_AT_HOLE):
                    check()
                    if block == _AT_HOLE:
                        file.seek(stream.recvHole(0), os.SEEK_CUR)
                    else:
                        file.write(block)

        self._transfer(receive, name, "fetching a data disk", deadline, tick)

    def _transfer(
        self,
        transfer: Callable[[libvirt.virStorageVol, libvirt.virStream, Tick], None],
        name: str,
        what: str,
        deadline: Deadline,
        tick: Tick,
    ) -> None:
        """Transfer a volume; stop at the next block when the caller no longer waits."""
        stop = threading.Event()

        def check() -> None:
            if stop.is_set():
                raise Stopped

        def run(connection: libvirt.virConnect) -> None:
            volume, stream = self._pool(connection).storageVolLookupByName(name), connection.newStream(0)
            try:
                transfer(volume, stream, check)
                stream.finish()
            except BaseException:
                stream.abort()
                raise

        try:
            self._backend.call(run, what=what, deadline=deadline, lane=Lane.WORK, tick=tick)
        except BaseException:
            stop.set()
            raise

    def _in_pool(
        self,
        function: Callable[[libvirt.virStoragePool], _T],
        what: str,
        deadline: Deadline,
        lane: Lane = Lane.WORK,
        tick: Tick | None = None,
    ) -> _T:
        """Return the result of `function`, called with the pool."""

        def run(connection: libvirt.virConnect) -> _T:
            return function(self._pool(connection))

        return self._backend.call(run, what=what, deadline=deadline, lane=lane, tick=tick)

    def _pool(self, connection: libvirt.virConnect) -> libvirt.virStoragePool:
        try:
            pool = connection.storagePoolLookupByName(self._name)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
                raise
            raise ProviderError(
                f"The other host has no storage pool {self._name}",
                why="providers.libvirt.pool names it",
                fix="define and start it there: virsh pool-define-as NAME dir --target DIRECTORY",
            ) from error
        if not pool.isActive():
            raise ProviderError(
                f"The storage pool {self._name} of the other host is not active",
                fix=f"virsh pool-start {self._name}; virsh pool-autostart {self._name}",
            )
        return pool


def volume_xml(name: str, size: int, backing: tuple[Path, str] | None = None) -> str:
    """Return the XML of a sparse volume, readable for root alone."""
    mode = element("permissions", element("mode", "0600"))
    volume = element(
        "volume",
        element("name", name),
        element("capacity", size, unit="bytes"),
        element("allocation", 0, unit="bytes"),
        element("target", element("format", type="qcow2" if backing else "raw"), mode),
    )
    if backing:
        path, kind = backing
        volume.append(element("backingStore", element("path", path), element("format", type=kind)))
    return etree.tostring(volume, encoding="unicode")


class PoolStorage(Storage):
    """Volumes of a storage pool."""

    def __init__(self, context: ProviderContext, options: Options, backend: Backend) -> None:
        self._volumes = Volumes(backend, options.pool)
        self._context = context

    def check(self, app: App, reader: Reader | None, deadline: Deadline, progress: Progress) -> None:
        options = options_of(app)
        progress("checking the image")
        for what, path in (("image", options.image), ("kernel", options.kernel), ("initrd", options.initrd)):
            if path is not None:
                self._fingerprint(what, path, deadline)

    def prepare(
        self, spec: AgentSpec, undo: Undo, deadline: Deadline, progress: Progress
    ) -> tuple[Path | None, Path]:
        name, size = spec.backend_name, disk_of(spec.app)
        tick = partial(progress, "creating the disks", "on the other host")
        volumes = self._volumes.sizes(name, deadline)
        current = current_data(volumes)
        root = self._root(spec, undo, volumes, deadline, tick)
        if not current or volumes[current] < size:
            with self._scratch(name, (spec.uid, spec.gid), deadline, tick) as disk:
                if current:
                    self._volumes.download(f"{name}.{current}", disk.path, deadline, tick)
                    disk.restore_owner()
                    disk.grow(size)
                else:
                    disk.create(size)
                    undo.append(lambda deadline: self.remove(name, data=True, deadline=deadline))
                current = self._replace_data(name, disk.path, volumes, deadline, tick)
        return root, self._volumes.path(f"{name}.{current}", deadline)

    def write_cloud_init(self, spec: AgentSpec, image: bytes, deadline: Deadline) -> Path:
        # On the other host's disk, for root and QEMU alone, until the machine is stopped.
        volume = f"{spec.backend_name}.seed.iso"
        self._volumes.delete(volume, deadline)
        self._volumes.create(volume, len(image), deadline)
        with open(os.memfd_create("cloud-init"), "wb", buffering=0) as file:  # it contains secrets
            file.write(image)
            self._volumes.upload(file.fileno(), volume, deadline, lambda: None)
        return self._volumes.path(volume, deadline)

    def keep_cloud_init(self, handle: Handle, deadline: Deadline) -> None:
        """The disk exists until the machine is stopped."""

    def remove_cloud_init(self, name: str, deadline: Deadline) -> None:
        self._volumes.delete(f"{name}.seed.iso", deadline)

    def remove(self, name: str, *, data: bool, deadline: Deadline) -> None:
        for suffix in self._volumes.sizes(name, deadline):
            if data or _ROOT.fullmatch(suffix):
                self._volumes.delete(f"{name}.{suffix}", deadline)

    def export_data(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        name, tick = handle.name, partial(progress, "exporting", "from the other host")
        current = current_data(self._volumes.sizes(name, deadline))
        with self._scratch(name, user_of(handle), deadline, tick) as disk:
            if current:
                self._volumes.download(f"{name}.{current}", disk.path, deadline, tick)
            disk.export_to(directory, progress)

    def import_data(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        name, tick = handle.name, partial(progress, "importing", "to the other host")
        volumes = self._volumes.sizes(name, deadline)
        size = max(disk_size_of(handle), volumes.get(current_data(volumes), SMALLEST_DISK))
        with self._scratch(name, user_of(handle), deadline, tick) as disk:
            disk.import_from(directory, size)
            self._replace_data(name, disk.path, volumes, deadline, tick)

    def _root(
        self, spec: AgentSpec, undo: Undo, volumes: dict[str, int], deadline: Deadline, tick: Tick
    ) -> Path | None:
        """Create or keep the overlay of the app's base image; copy the data disk before a change of it."""
        name, options = spec.backend_name, options_of(spec.app)
        if options.image is None:
            return None
        fingerprint, capacity = self._fingerprint("image", options.image, deadline)
        own = f"root-{fingerprint}.qcow2"
        others = [match[1] for one in volumes if (match := _ROOT.fullmatch(one)) and one != own]
        current = current_data(volumes)
        if others and own not in volumes and current and options.snapshots:
            self._volumes.clone(f"{name}.{current}", f"{name}.kept-{others[0]}.raw", deadline, tick)
        if options.root == "fresh" and own in volumes:
            self._volumes.delete(f"{name}.{own}", deadline)
        if options.root == "fresh" or own not in volumes:
            self._volumes.create(f"{name}.{own}", capacity, deadline, (options.image, options.format))
            undo.append(partial(self._volumes.delete, f"{name}.{own}"))
        for other in others[options.snapshots :]:
            self._volumes.delete(f"{name}.root-{other}.qcow2", deadline)
        return self._volumes.path(f"{name}.{own}", deadline)

    def _fingerprint(self, what: str, path: Path, deadline: Deadline) -> tuple[str, int]:
        found = self._volumes.fingerprint(path, deadline)
        if found is None:
            raise ProviderError(
                f"The {what} {path} cannot be used",
                why="no storage pool of the other host contains it",
                fix="put it there, into the directory of an active pool (virsh pool-refresh POOL)",
            )
        return found

    def _replace_data(
        self, name: str, source: Path, volumes: dict[str, int], deadline: Deadline, tick: Tick
    ) -> str:
        """Send a local file as the data disk and return its name; remove the old one when it is complete."""
        numbers = [int(match[1]) for one in volumes if (match := _DATA.fullmatch(one))]
        new = f"data-{max(numbers, default=0) + 1}"
        self._volumes.create(f"{name}.{new}.raw", source.stat().st_size, deadline)
        try:
            with source.open("rb") as file:
                self._volumes.upload(file.fileno(), f"{name}.{new}.raw", deadline, tick)
            self._volumes.create(f"{name}.{new}.ok", 1, deadline)
        except BaseException:
            self._volumes.delete(f"{name}.{new}.raw", Deadline(_CLEANUP))
            raise
        for old in numbers:
            self._volumes.delete(f"{name}.data-{old}.ok", deadline)
            self._volumes.delete(f"{name}.data-{old}.raw", deadline)
        return f"{new}.raw"

    @contextmanager
    def _scratch(self, name: str, user: tuple[int, int], deadline: Deadline, tick: Tick) -> Iterator[DataDisk]:
        """Yield a temporary data disk of this host, which does not exist yet."""
        directory = self._context.state_dir / "scratch" / name
        with disk_errors("copying a data disk", directory):
            remove_tree(directory)
            directory.mkdir(parents=True, mode=0o711)
        try:
            yield DataDisk(directory / "data.raw", user if self._context.privileged else None, deadline, tick)
        finally:
            remove_tree(directory)


def current_data(volumes: Iterable[str]) -> str:
    """Return the name of the data disk among a machine's volumes: the newest complete one, "" without one."""
    names = set(volumes)
    numbers = [int(match[1]) for name in names if (match := _DATA.fullmatch(name))]
    complete = [number for number in numbers if f"data-{number}.ok" in names]
    return f"data-{max(complete)}.raw" if complete else ""
