"""Disks of machines on another host: volumes of a libvirt storage pool.  Touches libvirt, and local scratch files.

    NAME.data-N.raw             a data disk; NAME.data-N.ok says that it arrived whole, the highest of those counts
    NAME.root-FINGERPRINT.qcow2 the overlay of one base image
    NAME.kept-FINGERPRINT.raw   the data disk from before a change of the image
    NAME.seed.iso               the seed disk

Whatever needs to look into a file system is done here, on a copy, in the same sandbox as for local disks.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import libvirt
from lxml import etree

from dispatcher.plugin import (
    AgentSpec,
    App,
    Deadline,
    DispatcherError,
    Handle,
    NotFound,
    Progress,
    ProviderContext,
    ProviderError,
)
from dispatcher_libvirt import plan, seed, streams, transfer
from dispatcher_libvirt.connection import Backend, Lane, Tick
from dispatcher_libvirt.disks import Disks
from dispatcher_libvirt.images import Reader
from dispatcher_libvirt.options import SMALLEST_DISK, Options, disk_of, options_of
from dispatcher_libvirt.storage import Made

_T = TypeVar("_T")
_ROOT = re.compile(r"root-([0-9a-f]{12})\.qcow2")
_DATA = re.compile(r"data-(\d+)\.raw")
_CLEANING = 30.0
_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


class PoolStorage:
    """A storage pool of the host that a URI names."""

    def __init__(self, context: ProviderContext, options: Options, backend: Backend) -> None:
        self._backend, self._pool = backend, options.pool
        self._privileged = context.privileged
        self._scratch = Disks(context.state_dir / "scratch", own=None, privileged=context.privileged)

    def check(self, app: App, reader: Reader | None, deadline: Deadline, progress: Progress) -> None:
        """See `storage.Storage`: files of the other host, of which it tells whether they are there."""
        options = options_of(app)
        progress("checking the image")
        for what, path in (("image", options.image), ("kernel", options.kernel), ("initrd", options.initrd)):
            if path is not None and self._fingerprint(path, deadline) is None:
                raise ProviderError(
                    f"The {what} {path} cannot be used",
                    why="no storage pool of the other host has it",
                    fix="put it there, into the directory of an active pool (virsh pool-refresh POOL)",
                )

    def make(
        self, spec: AgentSpec, made: Made, deadline: Deadline, progress: Progress
    ) -> tuple[Path | None, Path]:
        """See `storage.Storage`."""
        name, options, size = spec.backend_name, options_of(spec.app), disk_of(spec.app)
        user = self._user(spec.uid, spec.gid)
        tick = lambda: progress("making the disks", "on the other host")  # noqa: E731
        volumes = self._volumes(name, deadline)
        data = current(volumes)
        root = None
        if options.image is not None:
            root = self._root(spec, made, volumes, deadline, tick)
        if not data:
            with self._local(name) as disks:
                disks.create_data(name, size, user, full=False, deadline=deadline, tick=tick)
                made.data = True
                data = self._replace_data(name, disks.data(name), volumes, deadline, tick)
        elif volumes[data] < size:
            with self._local(name) as disks:
                self._fetch(name, data, disks.data(name), user, deadline, tick)
                disks.grow_data(name, size, user, full=False, deadline=deadline, tick=tick)
                data = self._replace_data(name, disks.data(name), volumes, deadline, tick)
        return root, self._path(name, data, deadline)

    def undo(self, name: str, made: Made, deadline: Deadline) -> None:
        """See `storage.Storage`."""
        try:
            self.remove_seed(name, deadline)
            if made.data:
                self.remove(name, data=True, deadline=deadline)
            elif made.root is not None:
                self._delete(made.root.name, deadline)
        except DispatcherError as error:
            _log.warning("%s: what a failed start left: %s", name, error)

    def write_seed(self, spec: AgentSpec, files: dict[str, bytes], deadline: Deadline) -> Path:
        """See `storage.Storage`.  It lies on the other host's disk, for root and QEMU alone, until the stop."""
        name, data = spec.backend_name, seed.image(files)
        self.remove_seed(name, deadline)
        self._create(f"{name}.seed.iso", len(data), deadline)

        def send(connection: libvirt.virConnect, stop: threading.Event) -> None:
            streams.upload_bytes(connection, self._volume(connection, f"{name}.seed.iso"), data, stop)

        self._long(send, "sending the seed disk", deadline, lambda: None)
        return self._path(name, "seed.iso", deadline)

    def keep_seed(self, handle: Handle, deadline: Deadline) -> None:
        """See `storage.Storage`: it is there until the machine is stopped."""

    def begin_log(self, spec: AgentSpec) -> Path | None:
        """See `storage.Storage`: the console of another host's machine is not kept."""
        return None

    def remove_seed(self, name: str, deadline: Deadline) -> None:
        """See `storage.Storage`."""
        self._delete(f"{name}.seed.iso", deadline)

    def remove(self, name: str, *, data: bool, deadline: Deadline) -> None:
        """See `storage.Storage`."""
        for suffix in self._volumes(name, deadline):
            if data or _ROOT.fullmatch(suffix):
                self._delete(f"{name}.{suffix}", deadline)

    def export(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        """See `storage.Storage`."""
        name, user = handle.name, self._user_of(handle)
        tick = lambda: progress("exporting", "from the other host")  # noqa: E731
        data = current(self._volumes(name, deadline))
        if not data:
            raise NotFound(f"{name} has no data disk", fix="start the agent once, or import data")
        with self._local(name) as disks:
            self._fetch(name, data, disks.data(name), user, deadline, tick)
            privileged = self._privileged
            transfer.export(
                disks, name, user, directory, privileged=privileged, deadline=deadline, progress=progress
            )

    def bring(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        """See `storage.Storage`."""
        name, user = handle.name, self._user_of(handle)
        volumes = self._volumes(name, deadline)
        size = max(plan.size_of(handle), volumes.get(current(volumes), SMALLEST_DISK))
        with self._local(name) as disks:
            transfer.bring(disks, name, user, directory, size, deadline=deadline, progress=progress)
            tick = lambda: progress("importing", "to the other host")  # noqa: E731
            self._replace_data(name, disks.data(name), volumes, deadline, tick)

    # -- overlays ----------------------------------------------------------------------------------------

    def _root(self, spec: AgentSpec, made: Made, volumes: dict[str, int], deadline: Deadline, tick: Tick) -> Path:
        name, options = spec.backend_name, options_of(spec.app)
        assert options.image is not None
        found = self._fingerprint(options.image, deadline)
        if found is None:
            raise ProviderError(f"The image {options.image} is gone", fix="put it into a pool of the other host")
        fingerprint, capacity = found
        suffix = f"root-{fingerprint}.qcow2"
        others = [match[1] for one in volumes if (match := _ROOT.fullmatch(one)) and one != suffix]
        data = current(volumes)
        if others and suffix not in volumes and data and options.snapshots:
            self._keep(name, data, f"kept-{others[0]}.raw", deadline, tick)
        if options.root == "fresh" and suffix in volumes:
            self._delete(f"{name}.{suffix}", deadline)
            volumes = {key: value for key, value in volumes.items() if key != suffix}
        if suffix not in volumes:
            backing = (options.image, options.format)
            self._create(f"{name}.{suffix}", capacity, deadline, form="qcow2", backing=backing)
            made.root = Path(f"{name}.{suffix}")
        for other in others[options.snapshots :]:
            self._delete(f"{name}.root-{other}.qcow2", deadline)
        return self._path(name, suffix, deadline)

    def _fingerprint(self, path: Path, deadline: Deadline) -> tuple[str, int] | None:
        """Return fingerprint and size in bytes of a file of the other host, None where no pool has it."""

        def look(connection: libvirt.virConnect) -> tuple[str, int] | None:
            try:
                volume = connection.storageVolLookupByPath(str(path))
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_STORAGE_VOL:
                    return None
                raise
            root = etree.fromstring(volume.XMLDesc())
            capacity = int(root.findtext("capacity") or 0)
            changed = root.findtext("target/timestamps/mtime") or ""
            return hashlib.sha256(f"{path} {capacity} {changed}".encode()).hexdigest()[:12], capacity

        return self._backend.call(look, what=f"looking at {path}", deadline=deadline)

    # -- the data disk -----------------------------------------------------------------------------------

    def _replace_data(
        self, name: str, source: Path, volumes: dict[str, int], deadline: Deadline, tick: Tick
    ) -> str:
        """Send a local file as the data disk, and return its name; the old one goes when it is whole."""
        numbers = [int(match[1]) for one in volumes if (match := _DATA.fullmatch(one))]
        number = max(numbers, default=0) + 1
        new = f"data-{number}"
        self._create(f"{name}.{new}.raw", source.stat().st_size, deadline)

        def send(connection: libvirt.virConnect, stop: threading.Event) -> None:
            streams.upload(connection, self._volume(connection, f"{name}.{new}.raw"), source, stop)

        try:
            self._long(send, "sending a data disk", deadline, tick)
            self._create(f"{name}.{new}.ok", 1, deadline)
        except BaseException:
            self._delete(f"{name}.{new}.raw", Deadline(_CLEANING))
            raise
        for old in numbers:
            self._delete(f"{name}.data-{old}.ok", deadline)
            self._delete(f"{name}.data-{old}.raw", deadline)
        return f"{new}.raw"

    def _keep(self, name: str, data: str, kept: str, deadline: Deadline, tick: Tick) -> None:
        """Copy the data disk on the other host."""
        self._delete(f"{name}.{kept}", deadline)

        def clone(connection: libvirt.virConnect, _: threading.Event) -> None:
            pool = self._pool_of(connection)
            volume = pool.storageVolLookupByName(f"{name}.{data}")
            pool.createXMLFrom(volume_xml(f"{name}.{kept}", volume.info()[1]), volume)

        self._long(clone, "taking a snapshot", deadline, tick)

    def _fetch(
        self, name: str, data: str, target: Path, user: tuple[int, int] | None, deadline: Deadline, tick: Tick
    ) -> None:
        def receive(connection: libvirt.virConnect, stop: threading.Event) -> None:
            streams.download(connection, self._volume(connection, f"{name}.{data}"), target, stop)

        self._long(receive, "fetching a data disk", deadline, tick)
        self._scratch.claim(name, user)

    @contextmanager
    def _local(self, name: str) -> Iterator[Disks]:
        """Yield local disks that are gone afterwards."""
        self._scratch.remove(name, data=True)
        self._scratch.make_directory(name)
        try:
            yield self._scratch
        finally:
            self._scratch.remove(name, data=True)

    # -- volumes -----------------------------------------------------------------------------------------

    def _volumes(self, name: str, deadline: Deadline) -> dict[str, int]:
        """Return a machine's volumes by what follows its name and a dot, with their sizes in bytes."""

        def look(connection: libvirt.virConnect) -> dict[str, int]:
            pool = self._pool_of(connection)
            pool.refresh()
            prefix = f"{name}."
            return {
                volume.name().removeprefix(prefix): volume.info()[1]
                for volume in pool.listAllVolumes()
                if volume.name().startswith(prefix)
            }

        return self._backend.call(look, what=f"looking for the disks of {name}", deadline=deadline)

    def _pool_of(self, connection: libvirt.virConnect) -> libvirt.virStoragePool:
        try:
            pool = connection.storagePoolLookupByName(self._pool)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
                raise
            raise ProviderError(
                f"The other host has no storage pool {self._pool}",
                why="providers.libvirt.pool names it",
                fix="define and start it there: virsh pool-define-as NAME dir --target DIRECTORY",
            ) from error
        if not pool.isActive():
            raise ProviderError(
                f"The storage pool {self._pool} of the other host is not active",
                fix=f"virsh pool-start {self._pool}; virsh pool-autostart {self._pool}",
            )
        return pool

    def _volume(self, connection: libvirt.virConnect, name: str) -> libvirt.virStorageVol:
        return self._pool_of(connection).storageVolLookupByName(name)

    def _path(self, name: str, suffix: str, deadline: Deadline) -> Path:
        def look(connection: libvirt.virConnect) -> str:
            return str(self._volume(connection, f"{name}.{suffix}").path())

        return Path(self._backend.call(look, what=f"looking for {name}.{suffix}", deadline=deadline))

    def _create(
        self,
        name: str,
        size: int,
        deadline: Deadline,
        *,
        form: str = "raw",
        backing: tuple[Path, str] | None = None,
    ) -> None:
        text = volume_xml(name, size, form=form, backing=backing)

        def create(connection: libvirt.virConnect) -> None:
            self._pool_of(connection).createXML(text)

        self._backend.call(create, what=f"making the disk {name}", deadline=deadline, lane=Lane.WORK)

    def _delete(self, name: str, deadline: Deadline) -> None:
        def delete(connection: libvirt.virConnect) -> None:
            pool = self._pool_of(connection)
            try:
                pool.storageVolLookupByName(name).delete()
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
                    raise

        self._backend.call(delete, what=f"removing the disk {name}", deadline=deadline, lane=Lane.WORK)

    def _long(
        self,
        work: Callable[[libvirt.virConnect, threading.Event], _T],
        what: str,
        deadline: Deadline,
        tick: Tick,
    ) -> _T:
        """Run work that moves many bytes; it is told to stop when nobody waits for it any more."""
        stop = threading.Event()
        try:
            return self._backend.call(
                lambda connection: work(connection, stop), what=what, deadline=deadline, lane=Lane.WORK, tick=tick
            )
        except BaseException:
            stop.set()
            raise

    def _user(self, uid: int, gid: int) -> tuple[int, int] | None:
        return (uid, gid) if self._privileged else None

    def _user_of(self, handle: Handle) -> tuple[int, int] | None:
        return plan.user_of(handle) if self._privileged else None


def current(volumes: Iterable[str]) -> str:
    """Return which of a machine's volumes is its data disk: the newest that arrived whole, "" without one."""
    known = set(volumes)
    whole = [int(match[1]) for one in known if (match := _DATA.fullmatch(one)) and f"data-{match[1]}.ok" in known]
    return f"data-{max(whole)}.raw" if whole else ""


def volume_xml(name: str, size: int, *, form: str = "raw", backing: tuple[Path, str] | None = None) -> str:
    """Return the XML of a volume that takes no space yet, for root alone."""
    volume = etree.Element("volume")
    etree.SubElement(volume, "name").text = name
    etree.SubElement(volume, "capacity", unit="bytes").text = str(size)
    etree.SubElement(volume, "allocation", unit="bytes").text = "0"
    target = etree.SubElement(volume, "target")
    etree.SubElement(target, "format", type=form)
    etree.SubElement(etree.SubElement(target, "permissions"), "mode").text = "0600"
    if backing:
        path, kind = backing
        store = etree.SubElement(volume, "backingStore")
        etree.SubElement(store, "path").text = str(path)
        etree.SubElement(store, "format", type=kind)
    return etree.tostring(volume, encoding="unicode")
