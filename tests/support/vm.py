"""Guests for tests: the example images, built once into .cache/vm, and the same with the kit's probe as their app.

Also a relay in front of libvirtd's socket that a test can break, so that the daemon itself is not disturbed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dispatcher.testing import PROBE

ROOT = Path(__file__).parent.parent.parent
IMAGES = ROOT / ".cache" / "vm"
LIBVIRT = "/var/run/libvirt/libvirt-sock"


def images() -> Path:
    """Return the directory with the example images, built where they are absent or older than their sources."""
    sources = [path for path in (ROOT / "examples" / "vm").iterdir() if path.is_file()]
    made = IMAGES / "disk.qcow2"
    IMAGES.mkdir(parents=True, exist_ok=True)
    with (IMAGES / "made.lock").open("w") as lock:  # two workers run guests
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists() or made.stat().st_mtime < max(path.stat().st_mtime for path in sources):
            subprocess.run(
                [ROOT / "examples/vm/build-image", "--bootable"], check=True, capture_output=True, timeout=240
            )
        unpack_kernel(IMAGES / "vmlinux", IMAGES / "vmlinuz")
        with_app(IMAGES / "probe.img", IMAGES / "initrd.img", PROBE)
    return IMAGES


def unpack_kernel(target: Path, source: Path) -> None:
    """Decompress a kernel, for which an emulated guest takes half a second at each boot; copy one of another format."""
    if target.exists() and target.stat().st_mtime > source.stat().st_mtime:
        return
    data, temporary = source.read_bytes(), target.with_suffix(".new")
    at = data.find(b"\x02\x21\x4c\x18")  # LZ4, which Debian uses
    if at >= 0 and shutil.which("lz4"):
        done = subprocess.run(["lz4", "-d", "-c"], input=data[at:], capture_output=True)  # more data follows
        data = done.stdout if done.stdout.startswith(b"\x7fELF") else data
    temporary.write_bytes(data)
    temporary.rename(target)


#: The probe needs neither TLS nor OpenSSL's hashes; loading them takes an emulated guest a quarter of a second.
START = """#!/bin/sh
exec /usr/bin/python3.11 -I -S -c 'import sys, runpy
sys.modules.update(dict.fromkeys(["ssl", "_hashlib"]))
sys.argv[0] = "/app/app.py"
runpy.run_path(sys.argv[0], run_name="__main__")' "$@"
"""


def with_app(target: Path, initrd: Path, app: Path) -> None:
    """Make an initial RAM disk with another app, which replaces that of the root disk."""
    newest = max(path.stat().st_mtime for path in (initrd, app, Path(__file__)))
    if target.exists() and target.stat().st_mtime > newest:
        return
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "app"
        folder.mkdir()
        shutil.copy(app, folder / "app.py")
        (folder / "start").write_text(START)
        (folder / "start").chmod(0o755)
        archive = subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"],
            input=b"app\napp/app.py\napp/start\n",
            cwd=directory,
            check=True,
            capture_output=True,
        ).stdout
    temporary = target.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(initrd.read_bytes() + archive)
    temporary.rename(target)


def app_options(**changes: object) -> dict[str, object]:
    """Return ``[apps.X.libvirt]`` for a guest that runs the probe."""
    found = images()
    options = {
        "image": str(found / "root.qcow2"),
        "kernel": str(found / "vmlinux"),
        "initrd": str(found / "probe.img"),
        "cmdline": "console=ttyS0 quiet loglevel=3 panic=-1 cryptomgr.notests mitigations=off no_timer_check",
        "default_memory": "160M",
        "data_size": "64M",
        "flush": "3s",
    }
    return options | changes


class Relay:
    """A process that relays a Unix socket, and can be down or silent."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="relay-"))
        self.path = self.directory / "sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.up()

    @property
    def uri(self) -> str:
        """The connection URI that goes through the relay."""
        return f"qemu+unix:///system?socket={self.path}"

    def up(self) -> None:
        """Start to relay."""
        self._process = subprocess.Popen([sys.executable, __file__, str(self.path)])
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(self.path))
                return
            time.sleep(0.02)
        raise RuntimeError("the relay does not start")

    def down(self) -> None:
        """Stop, and end every connection."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
        self.path.unlink(missing_ok=True)

    def silent(self, on: bool) -> None:
        """Accept connections and requests without an answer (`on`), or go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if on else signal.SIGCONT)

    @contextlib.contextmanager
    def broken(self, how: str):
        """Be down or silent within the block."""
        if how == "down":
            self.down()
        else:
            self.silent(True)
        try:
            yield
        finally:
            if how == "down":
                self.up()
            else:
                self.silent(False)

    def close(self) -> None:
        """Stop and clean up."""
        self.down()
        shutil.rmtree(self.directory, ignore_errors=True)


def virsh(*arguments: str) -> str:
    """Return the output of virsh, without the relay."""
    done = subprocess.run(
        ["virsh", "--quiet", "--connect", "qemu:///system", *arguments], capture_output=True, text=True, timeout=60
    )
    return done.stdout


def leftovers(installation: str, *roots: Path) -> set[str]:
    """Return the remains of an installation's machines on the host and in libvirt."""
    prefix = f"dispatcher-{installation}"
    found = {f"domain {name}" for name in virsh("list", "--all", "--name").split() if name.startswith(prefix)}
    found |= {f"filter {name}" for name in virsh("nwfilter-list").split() if name.startswith(prefix)}
    tables = subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout
    found |= {f"rules {name}" for name in tables.split() if name.startswith(prefix)}
    for network in virsh("net-list", "--name").split():
        found |= {f"address {name}" for name in re.findall(rf"{prefix}[^']*", virsh("net-dumpxml", network))}
    places = [
        Path("/dev/shm", f"dispatcher-seeds-{installation}"),
        Path("/run", f"dispatcher-seeds-{installation}"),
    ]
    places += [Path("/var/lib/libvirt/qemu/save"), *(root / "machines" for root in roots)]
    for place in places:
        for path in place.glob("*"):
            if path.name.startswith(prefix):
                found.add(f"file {path}")
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"guest={prefix}".encode() in process.read_bytes():
                found.add(f"process {process.parent.name}")
    return found


def qemus(name: str) -> list[int]:
    """Return the process ids of a machine's QEMU."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"guest={name},".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def libvirtd() -> int:
    """Return libvirtd's process id."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(LIBVIRT)
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)


def kill_libvirtd() -> None:
    """Kill libvirtd, and wait until it has ended."""
    os.kill(libvirtd(), signal.SIGKILL)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(LIBVIRT)
        except OSError:
            return
        time.sleep(0.02)
    raise RuntimeError("libvirtd does not end")


def start_libvirtd() -> None:
    """Start libvirtd, as the tests do at their beginning."""
    subprocess.run([ROOT / "tests/machine/start-libvirt"], check=True, timeout=90)


def relay(path: str) -> None:
    """Run the relay process: each connection is one to libvirtd."""
    import asyncio

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, to = await asyncio.open_unix_connection(LIBVIRT)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, to), copy(there, writer))

    async def main() -> None:
        server = await asyncio.start_unix_server(serve, path)
        await server.serve_forever()

    asyncio.run(main())


if __name__ == "__main__":
    relay(sys.argv[1])
