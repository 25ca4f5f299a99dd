"""Files to volumes of another host and back, holes kept.  Touches files and libvirt streams.

Runs in a thread of the pool; `stop` is looked at with every block, as libvirt cannot be told otherwise.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import libvirt

_BLOCK = 256 * 1024


class Stopped(Exception):
    """Nobody waits for the rest."""


def upload(
    connection: libvirt.virConnect, volume: libvirt.virStorageVol, source: Path, stop: threading.Event
) -> None:
    """Send a file to a volume.

    :raises libvirtError: it did not arrive; :raises OSError: it cannot be read; :raises Stopped: by `stop`.
    """
    with source.open("rb") as file:
        fd = file.fileno()
        size = os.fstat(fd).st_size
        stream = connection.newStream(0)
        volume.upload(stream, 0, size, libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM)
        try:
            at = 0
            while at < size:
                data = _next(fd, at, os.SEEK_DATA, size)
                if data > at:
                    _check(stop)
                    stream.sendHole(data - at)
                    at = data
                end = _next(fd, at, os.SEEK_HOLE, size)
                while at < end:
                    _check(stop)
                    at += _send(stream, os.pread(fd, min(_BLOCK, end - at), at))
            stream.finish()
        except BaseException:
            stream.abort()
            raise


def upload_bytes(
    connection: libvirt.virConnect, volume: libvirt.virStorageVol, data: bytes, stop: threading.Event
) -> None:
    """Send bytes to a volume.

    :raises libvirtError: they did not arrive; :raises Stopped: by `stop`.
    """
    stream = connection.newStream(0)
    volume.upload(stream, 0, len(data), 0)
    try:
        for at in range(0, len(data), _BLOCK):
            _check(stop)
            _send(stream, data[at : at + _BLOCK])
        stream.finish()
    except BaseException:
        stream.abort()
        raise


def download(
    connection: libvirt.virConnect, volume: libvirt.virStorageVol, target: Path, stop: threading.Event
) -> None:
    """Receive a volume into a new file, mode 0600.

    :raises libvirtError: it did not arrive whole; :raises OSError: no space; :raises Stopped: by `stop`.
    """
    size = volume.info()[1]
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
        stream = connection.newStream(0)
        volume.download(stream, 0, size, libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM)
        try:
            at = 0
            while True:
                _check(stop)
                block = stream.recvFlags(_BLOCK, libvirt.VIR_STREAM_RECV_STOP_AT_HOLE)
                if block == -3:
                    at += stream.recvHole(0)
                    continue
                if not block:
                    break
                at += os.pwrite(fd, block, at)
            stream.finish()
        except BaseException:
            stream.abort()
            raise
    finally:
        os.close(fd)


def _send(stream: libvirt.virStream, block: bytes) -> int:
    sent = 0
    while sent < len(block):
        sent += int(stream.send(block[sent:]))
    return sent


def _next(fd: int, at: int, what: int, size: int) -> int:
    try:
        return os.lseek(fd, at, what)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from here
            return size
        raise


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped
