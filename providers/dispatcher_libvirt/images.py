"""Checks of base images, kernels and initial RAM disks.

A positive result is cached by path, size and modification time, so that the next check costs one `stat`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dispatcher.plugin import Deadline, DeadlineExceeded, ProviderError
from dispatcher_libvirt import sandbox
from dispatcher_libvirt.options import AppOptions

_QCOW2 = b"QFI\xfb"
_INITRD = {
    b"070701": "cpio",
    b"070702": "cpio",
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\x89LZO": "lzo",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x5d\x00\x00": "lzma",
}
_SEE = "check the app's libvirt table (docs/howto/vm-images.md)"


@dataclass(frozen=True, slots=True)
class Reader:
    """The host user of a machine's QEMU, which reads the images."""

    uid: int
    gid: int


class Images:
    """Checks the files that machines boot from."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._good: dict[tuple[str, str], str] = {}

    def check(
        self, options: AppOptions, reader: Reader | None, *, deadline: Deadline, tick: Callable[[], None]
    ) -> tuple[str, str]:
        """Return fingerprints of the base image ("" without one) and of all boot files together.

        :param reader: the user that must be able to read them; None where libvirt makes them readable.
        :raises ProviderError: one is missing, unreadable, damaged or of another format.
        """
        parts = []
        for what, path, look in (("kernel", options.kernel, _kernel), ("initrd", options.initrd, _initrd)):
            if path is not None:
                parts.append(f"{path} {self._once(what, path, reader, partial(look, path))}")
        tick()
        base = ""
        if options.image is not None:
            bootable = options.kernel is None
            look_at = partial(_image, options.image, options.format, bootable=bootable, deadline=deadline)
            key = self._once(f"image {options.format} {bootable}", options.image, reader, look_at)
            parts.append(f"{options.image} {key}")
            base = _digest(parts[-1])
        return base, _digest("\n".join(parts))

    def _once(self, what: str, path: Path, reader: Reader | None, look: Callable[[], None]) -> str:
        try:
            found = path.stat()
        except OSError as error:
            name = what.partition(" ")[0]
            raise ProviderError(
                f"The {name} {path} cannot be used",
                why=error.strerror or str(error),
                fix=f"put it there, or {_SEE}",
            ) from error
        if not stat.S_ISREG(found.st_mode):
            raise ProviderError(f"{path} is not a regular file", fix=_SEE)
        if reader is not None:
            _readable(path, reader)
        key = f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"
        with self._lock:
            known = self._good.get((what, str(path)))
        if known != key:
            look()
            with self._lock:
                self._good[what, str(path)] = key
        return key


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def passable(path: Path, reader: Reader) -> str:
    """Return the command that makes the parents of `path` passable for a user, "" where they are."""
    for directory in reversed(path.parents):
        if directory.exists() and not _allowed(directory.stat(), reader, stat.S_IXOTH):
            return f"chmod o+x {directory}"
    return ""


def _readable(path: Path, reader: Reader) -> None:
    path = Path(os.path.realpath(path))
    command = passable(path, reader)
    if not command and not _allowed(path.stat(), reader, stat.S_IROTH):
        command = f"chmod o+r {path}"
    if command:
        raise ProviderError(
            f"Machines may not read {path}", why=f"their QEMU runs as user {reader.uid}, not as root", fix=command
        )


def _allowed(found: os.stat_result, reader: Reader, bit: int) -> bool:
    if found.st_uid == reader.uid:
        return bool(found.st_mode & bit << 6)
    if found.st_gid == reader.gid:
        return bool(found.st_mode & bit << 3)
    return bool(found.st_mode & bit)


def _head(path: Path, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(length)
    except OSError as error:
        raise ProviderError(f"{path} cannot be read", why=error.strerror or str(error), fix=_SEE) from error


def _kernel(path: Path) -> None:
    head = _head(path, 4096)
    if not (head[0x202:0x206] == b"HdrS" or head[:4] == b"\x7fELF" or head[0x38:0x3C] == b"ARM\x64"):
        raise ProviderError(
            f"{path} is not a Linux kernel", why="it is neither bzImage nor ELF nor arm64 Image", fix=_SEE
        )


def _initrd(path: Path) -> None:
    head = _head(path, 8)
    if not any(head.startswith(magic) for magic in _INITRD):
        raise ProviderError(
            f"{path} is not an initial RAM disk",
            why="it is neither cpio nor in a compression format of Linux",
            fix=_SEE,
        )


def _image(path: Path, form: str, *, bootable: bool, deadline: Deadline) -> None:
    head = _head(path, 512)
    if form == "qcow2" and not head.startswith(_QCOW2):
        raise ProviderError(
            f"{path} is not a qcow2 image", why="its first bytes differ", fix='set format = "raw"?'
        )
    if form == "raw" and head.startswith(_QCOW2):
        raise ProviderError(f"{path} is a qcow2 image", why='format says "raw"', fix='set format = "qcow2"')
    about = json.loads(_qemu_img(path, form, "info", deadline) or "{}")
    if backing := about.get("full-backing-filename"):
        raise ProviderError(
            f"{path} is an overlay itself",
            why=f"its base is {backing}",
            fix=f"flatten it: qemu-img convert -O qcow2 {path} NEW",
        )
    if about.get("encrypted") or about.get("format-specific", {}).get("data", {}).get("data-file"):
        raise ProviderError(
            f"{path} is encrypted or has an external data file", fix="convert it to a plain qcow2 image"
        )
    if form == "qcow2":
        _qemu_img(path, form, "check", deadline, allowed=(0, 3))  # 3: leaked clusters, no damage
    if bootable:
        _boots(path, form, deadline)


def _boots(path: Path, form: str, deadline: Deadline) -> None:
    with tempfile.TemporaryDirectory() as directory:
        sector = Path(directory, "head")
        _run(["dd", "-f", form, "-O", "raw", "bs=1024", "count=1", f"if={path}", f"of={sector}"], path, deadline)
        head = sector.read_bytes()
    if len(head) < 512 or head[510:512] != b"\x55\xaa":
        raise ProviderError(
            f"{path} does not boot by itself",
            why="it has no boot sector",
            fix="configure its kernel and initrd, or install a boot loader",
        )


def _qemu_img(path: Path, form: str, command: str, deadline: Deadline, allowed: tuple[int, ...] = (0,)) -> str:
    return _run([command, "--output=json", "-f", form, str(path)], path, deadline, allowed)


def _run(arguments: list[str], path: Path, deadline: Deadline, allowed: tuple[int, ...] = (0,)) -> str:
    try:
        done = subprocess.run(
            [sandbox.tool("qemu-img"), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, deadline.remaining()),
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"Checking {path} took too long", fix="try again with more time") from error
    if done.returncode not in allowed:
        raise ProviderError(
            f"The image {path} is damaged",
            why=" ".join((done.stderr or done.stdout).split())[-400:],
            fix="copy it again, and verify it with qemu-img check",
        )
    return done.stdout
