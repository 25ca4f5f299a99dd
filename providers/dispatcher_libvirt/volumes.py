"""Volumes of a storage pool on another host, and their transfer over libvirt streams, with holes."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import libvirt
from lxml import etree

from dispatcher.plugin import Deadline, ProviderError
from dispatcher_libvirt.connection import Backend, Lane, Tick
from dispatcher_libvirt.xml_input import parse_xml

_BLOCK = 256 * 1024
_AT_HOLE = -3  # result of virStream.recvFlags
_NO_VOLUME = libvirt.VIR_ERR_NO_STORAGE_VOL

Transfer = Callable[[libvirt.virConnect, Callable[[], None]], None]


class Stopped(Exception):
    """The caller of a transfer no longer waits for it."""


class Volumes:
    """The volumes of one storage pool."""

    def __init__(self, backend: Backend, pool: str) -> None:
        self._backend, self._name = backend, pool

    def sizes(self, machine: str, deadline: Deadline) -> dict[str, int]:
        """Return sizes in bytes of a machine's volumes, by their names without the machine's name and dot."""
        prefix = f"{machine}."

        def look(connection: libvirt.virConnect) -> dict[str, int]:
            pool = self._pool(connection)
            pool.refresh()
            found = {volume.name(): volume.info()[1] for volume in pool.listAllVolumes()}
            return {name.removeprefix(prefix): size for name, size in found.items() if name.startswith(prefix)}

        return self._backend.call(look, what=f"looking for the disks of {machine}", deadline=deadline)

    def path(self, name: str, deadline: Deadline) -> Path:
        """Return the path of a volume on the other host."""

        def look(connection: libvirt.virConnect) -> str:
            return str(self._volume(connection, name).path())

        return Path(self._backend.call(look, what=f"looking for {name}", deadline=deadline))

    def fingerprint(self, path: Path, deadline: Deadline) -> tuple[str, int] | None:
        """Return fingerprint and size in bytes of a file in any pool of the other host, None where none has it."""

        def look(connection: libvirt.virConnect) -> tuple[str, int] | None:
            try:
                volume = connection.storageVolLookupByPath(str(path))
            except libvirt.libvirtError as error:
                if error.get_error_code() == _NO_VOLUME:
                    return None
                raise
            root = parse_xml(volume.XMLDesc())
            capacity = int(root.findtext("capacity") or 0)
            changed = root.findtext("target/timestamps/mtime") or ""
            return hashlib.sha256(f"{path} {capacity} {changed}".encode()).hexdigest()[:12], capacity

        return self._backend.call(look, what=f"looking at {path}", deadline=deadline)

    def create(
        self,
        name: str,
        size: int,
        deadline: Deadline,
        *,
        form: str = "raw",
        backing: tuple[Path, str] | None = None,
    ) -> None:
        """Create a sparse volume."""
        text = volume_xml(name, size, form=form, backing=backing)

        def create(connection: libvirt.virConnect) -> None:
            self._pool(connection).createXML(text)

        self._backend.call(create, what=f"creating the disk {name}", deadline=deadline, lane=Lane.WORK)

    def delete(self, name: str, deadline: Deadline) -> None:
        """Delete a volume.  Absent is success."""

        def delete(connection: libvirt.virConnect) -> None:
            pool = self._pool(connection)
            try:
                pool.storageVolLookupByName(name).delete()
            except libvirt.libvirtError as error:
                if error.get_error_code() != _NO_VOLUME:
                    raise

        self._backend.call(delete, what=f"removing the disk {name}", deadline=deadline, lane=Lane.WORK)

    def clone(self, source: str, target: str, deadline: Deadline, tick: Tick) -> None:
        """Copy a volume on the other host, in place of an existing one."""
        self.delete(target, deadline)

        def clone(connection: libvirt.virConnect, _: Callable[[], None]) -> None:
            pool = self._pool(connection)
            volume = pool.storageVolLookupByName(source)
            pool.createXMLFrom(volume_xml(target, volume.info()[1]), volume)

        self._transfer(clone, "taking a snapshot", deadline, tick)

    def upload(self, source: Path, name: str, deadline: Deadline, tick: Tick) -> None:
        """Send a file to a volume."""

        def send(connection: libvirt.virConnect, check: Callable[[], None]) -> None:
            volume = self._volume(connection, name)
            with source.open("rb") as file, _stream(connection) as stream:
                fd = file.fileno()
                size = os.fstat(fd).st_size
                volume.upload(stream, 0, size, libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM)
                at = 0
                while at < size:
                    check()
                    data = _seek(fd, at, os.SEEK_DATA, size)
                    if data > at:
                        stream.sendHole(data - at)
                    at = _seek(fd, data, os.SEEK_HOLE, size)
                    for offset in range(data, at, _BLOCK):
                        check()
                        _send(stream, os.pread(fd, min(_BLOCK, at - offset), offset))

        self._transfer(send, "sending a data disk", deadline, tick)

    def upload_bytes(self, data: bytes, name: str, deadline: Deadline) -> None:
        """Send bytes to a volume."""

        def send(connection: libvirt.virConnect, check: Callable[[], None]) -> None:
            volume = self._volume(connection, name)
            with _stream(connection) as stream:
                volume.upload(stream, 0, len(data), 0)
                for at in range(0, len(data), _BLOCK):
                    check()
                    _send(stream, data[at : at + _BLOCK])

        self._transfer(send, "sending the cloud-init disk", deadline, lambda: None)

    def download(self, name: str, target: Path, deadline: Deadline, tick: Tick) -> None:
        """Receive a volume into a new file, mode 0600."""

        def receive(connection: libvirt.virConnect, check: Callable[[], None]) -> None:
            volume = self._volume(connection, name)
            size = volume.info()[1]
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size)
                with _stream(connection) as stream:
                    volume.download(stream, 0, size, libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM)
                    at = 0
                    while True:
                        check()
                        block = stream.recvFlags(_BLOCK, libvirt.VIR_STREAM_RECV_STOP_AT_HOLE)
                        if block == _AT_HOLE:
                            at += stream.recvHole(0)
                        elif block:
                            at += os.pwrite(fd, block, at)
                        else:
                            break
            finally:
                os.close(fd)

        self._transfer(receive, "fetching a data disk", deadline, tick)

    def _transfer(self, transfer: Transfer, what: str, deadline: Deadline, tick: Tick) -> None:
        """Run a long call; it stops at the next block when the caller no longer waits."""
        stop = threading.Event()

        def check() -> None:
            if stop.is_set():
                raise Stopped

        def run(connection: libvirt.virConnect) -> None:
            transfer(connection, check)

        try:
            self._backend.call(run, what=what, deadline=deadline, lane=Lane.WORK, tick=tick)
        except BaseException:
            stop.set()
            raise

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

    def _volume(self, connection: libvirt.virConnect, name: str) -> libvirt.virStorageVol:
        return self._pool(connection).storageVolLookupByName(name)


def volume_xml(name: str, size: int, *, form: str = "raw", backing: tuple[Path, str] | None = None) -> str:
    """Return the XML of a sparse volume, readable for root alone."""
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


@contextmanager
def _stream(connection: libvirt.virConnect) -> Iterator[libvirt.virStream]:
    stream = connection.newStream(0)
    try:
        yield stream
        stream.finish()
    except BaseException:
        stream.abort()
        raise


def _send(stream: libvirt.virStream, block: bytes) -> None:
    sent = 0
    while sent < len(block):
        sent += int(stream.send(block[sent:]))


def _seek(fd: int, at: int, what: int, size: int) -> int:
    try:
        return os.lseek(fd, at, what)
    except OSError as error:
        if error.errno == errno.ENXIO:  # only a hole from here
            return size
        raise
