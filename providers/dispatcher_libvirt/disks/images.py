"""Checks of base images, kernels and initial RAM disks; overlays of base images.

A positive result is cached by path, size and modification time, so that the next check costs one `stat`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dispatcher.plugin import Deadline, DeadlineExceeded, ProviderError
from dispatcher_libvirt.disks import sandbox
from dispatcher_libvirt.disks.sandbox import Tick
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
        self._good: dict[tuple[str, Path], str] = {}

    def check(self, options: AppOptions, reader: Reader | None, deadline: Deadline, tick: Tick) -> tuple[str, str]:
        """Return fingerprints of the base image ("" without one) and of all boot files together.

        :param reader: the user that must be able to read them; None where libvirt makes them readable.
        :raises ProviderError: one is missing, unreadable, damaged or of another format.
        """
        bootable = options.kernel is None
        image_check = partial(_image, form=options.format, bootable=bootable, deadline=deadline)
        checks: list[tuple[str, Path | None, Callable[[Path], None]]] = [
            ("kernel", options.kernel, _kernel),
            ("initrd", options.initrd, _initrd),
            (f"image {options.format} {bootable}", options.image, image_check),
        ]
        states = []
        for what, path, look in checks:
            if path is not None:
                tick()
                states.append(f"{path} {self._once(what, path, reader, look)}")
        return _digest(states[-1]) if options.image else "", _digest("\n".join(states))

    def _once(self, what: str, path: Path, reader: Reader | None, look: Callable[[Path], None]) -> str:
        """Check a file unless it is the same as at the last time; return what identifies its state."""
        try:
            found = path.stat()
        except OSError as error:
            raise ProviderError(
                f"The {what.partition(' ')[0]} {path} cannot be used",
                why=error.strerror or str(error),
                fix=f"put it there, or {_SEE}",
            ) from error
        if not stat.S_ISREG(found.st_mode):
            raise ProviderError(f"{path} is not a regular file", fix=_SEE)
        if reader is not None:
            _readable(path, reader)
        state = f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"
        if self._good.get((what, path)) != state:
            look(path)
            self._good[what, path] = state
        return state


def create_overlay(path: Path, base: Path, form: str, user: tuple[int, int] | None) -> None:
    """Create the overlay of a base image.

    :raises OSError: no space; :raises ProviderError: qemu-img failed.
    """
    temporary = path.with_name(f".{secrets.token_hex(4)}.new")
    try:
        done = _qemu_img(["create", "-q", "-f", "qcow2", "-b", base, "-F", form, temporary], base, Deadline(60))
        if done.returncode and os.strerror(errno.ENOSPC).lower() in done.stderr.lower():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path.parent))
        if done.returncode:
            raise ProviderError(
                f"Cannot create an overlay of {base}",
                why=" ".join(done.stderr.split())[-400:],
                fix="check that the image and `format` are right",
            )
        temporary.chmod(0o600)
        if user is not None:
            os.chown(temporary, *user)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _image(path: Path, *, form: str, bootable: bool, deadline: Deadline) -> None:
    head = _head(path, 512)
    if form == "qcow2" and not head.startswith(_QCOW2):
        raise ProviderError(
            f"{path} is not a qcow2 image", why="its first bytes differ", fix='set format = "raw"?'
        )
    if form == "raw" and head.startswith(_QCOW2):
        raise ProviderError(f"{path} is a qcow2 image", why='format says "raw"', fix='set format = "qcow2"')
    about = json.loads(_checked(["info", "--output=json", "-f", form, path], path, deadline))
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
        _checked(
            ["check", "-q", "-f", form, path], path, deadline, allowed=(0, 3)
        )  # 3: leaked clusters, no damage
    if bootable:
        with tempfile.TemporaryDirectory() as directory:
            sector = Path(directory, "head")
            dd = ["dd", "-f", form, "-O", "raw", "bs=512", "count=1", f"if={path}", f"of={sector}"]
            _checked(dd, path, deadline)
            bootable = sector.read_bytes()[510:] == b"\x55\xaa"
        if not bootable:
            raise ProviderError(
                f"{path} does not boot by itself",
                why="it has no boot sector",
                fix="configure its kernel and initrd, or install a boot loader",
            )


def _checked(
    arguments: Sequence[str | Path], path: Path, deadline: Deadline, allowed: tuple[int, ...] = (0,)
) -> str:
    """Return the output of qemu-img on an image.

    :raises ProviderError: it found damage.
    """
    done = _qemu_img(arguments, path, deadline)
    if done.returncode not in allowed:
        raise ProviderError(
            f"The image {path} is damaged",
            why=" ".join((done.stderr or done.stdout).split())[-400:],
            fix="copy it again, and verify it with qemu-img check",
        )
    return done.stdout


def _qemu_img(arguments: Sequence[str | Path], path: Path, deadline: Deadline) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [sandbox.tool("qemu-img"), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, deadline.remaining()),
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"qemu-img took too long with {path}", fix="try again with more time") from error
