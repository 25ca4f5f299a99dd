"""A whole machine for tests: Debian or Ubuntu with its own kernel, systemd and cgroup v2, emulated by QEMU.

`tests/machine/build-machine` builds the system once.  Each machine's disk is made of a copy of it, in which a script may
install something before the machine starts, as this is much faster than in the emulated machine.  There commands run
through the QEMU guest agent, one at a time.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

SUITE = os.environ.get("DISPATCHER_TEST_SUITE", "bookworm")  # the release of Debian or Ubuntu
ROOT = Path(__file__).parent.parent.parent
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BOOT = 400  # seconds until it runs commands


@dataclass(frozen=True)
class Done:
    """A command that has ended: its exit status and its output."""

    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        return self.out + self.err


class Machine:
    """A running machine."""

    def __init__(
        self, files: dict[str, Path], *, install: str = "", memory: int = 2048, suite: str = SUITE
    ) -> None:
        """Start it.

        :param files: name below /srv of the machine -> file or directory.
        :param install: script that runs as root in the system before it starts, without a network.
        """
        built = subprocess.run(
            [ROOT / "tests/machine/build-machine", suite], capture_output=True, text=True, timeout=900
        )
        assert built.returncode == 0, built.stderr
        self.base = Path(built.stdout.strip())
        self._stack = contextlib.ExitStack()
        self.work = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="machine-", dir=self.base)))
        root = self.work / "root"
        subprocess.run(["cp", "-a", "--reflink=auto", self.base / "root", root], check=True)
        for name, path in files.items():
            subprocess.run(["cp", "-a", path, root / "srv" / name], check=True)
        enter = f"mount -t proc p {root}/proc; mount --rbind /dev {root}/dev; exec chroot {root} bash -euc {quote(install)}"
        installed = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--net", "sh", "-ec", enter],
            env={"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert installed.returncode == 0, installed.stdout + installed.stderr
        subprocess.run(
            ["mke2fs", "-q", "-t", "ext4", "-d", root, self.work / "disk", "4G"], check=True, capture_output=True
        )
        shutil.rmtree(root)
        self._log = self._stack.enter_context((self.work / "qemu").open("wb"))
        self._command = [
            # Without features that make the kernel use instructions which are slow to emulate.
            *(
                "qemu-system-x86_64",
                "-M",
                "q35",
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max,-erms,-fsrm",
                "-smp",
                "2",
            ),
            *("-m", str(memory), "-display", "none", "-nic", "none", "-nodefaults", "-no-reboot"),
            *("-kernel", self.base / "vmlinuz", "-initrd", self.base / "initrd", "-append"),
            "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off cryptomgr.notests no_timer_check",
            *("-drive", f"file={self.work}/disk,if=virtio,format=raw,cache=unsafe"),
            *("-chardev", f"file,id=console,path={self.work}/console,append=on", "-serial", "chardev:console"),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial"),
            *("-chardev", f"socket,id=agent,path={self.work}/agent,server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
        ]
        self._sock: socket.socket | None = None
        self._stack.callback(self._end)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def console(self) -> str:
        """What it printed."""
        return "".join(
            (self.work / name).read_text(errors="replace")[-4000:]
            for name in ("qemu", "console")
            if (self.work / name).exists()
        )

    def _connect(self) -> None:
        """Connect to the guest agent, and wait until it responds."""
        if self._sock:
            self._sock.close()
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(5)
        self._sock.connect(str(self.work / "agent"))
        self._lines = self._sock.makefile("rb")
        mark = time.monotonic_ns() % 2**31
        self._sock.sendall(
            b"\xff" + json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": mark}}).encode() + b"\n"
        )
        while json.loads(self._lines.readline().lstrip(b"\xff") or b"{}").get("return") != mark:
            pass
        self._sock.settimeout(60)

    def _call(self, command: str, **arguments: object) -> object:
        assert self._sock
        self._sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        answer = json.loads(self._lines.readline())
        assert "return" in answer, answer
        return answer["return"]

    def _start(self) -> None:
        """Start it and wait until all its units have started."""
        self._qemu = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
        )
        end, state = time.monotonic() + BOOT, ""
        while state not in ("running", "degraded"):
            assert self._qemu.poll() is None, f"QEMU ended: {self.console}"
            assert time.monotonic() < end, f"the machine does not start ({state}): {self.console}"
            try:
                self._connect()
                state = self.run("systemctl is-system-running --wait", check=False, timeout=BOOT).out.strip()
            except (OSError, ValueError):
                time.sleep(0.3)

    def run(self, script: str, *, stdin: str = "", check: bool = True, timeout: float = 120) -> Done:
        """Run a script of bash as root and wait for it."""
        pid = self._call(
            "guest-exec",
            path="/usr/bin/timeout",
            arg=[str(timeout), "bash", "-c", f"cd /\n{script}"],
            env=[f"PATH={PATH}", "HOME=/root", "LANG=C.UTF-8"],
            **{"input-data": base64.b64encode(stdin.encode()).decode(), "capture-output": True},
        )["pid"]
        pause, end = 0.02, time.monotonic() + timeout + 30
        while not (status := self._call("guest-exec-status", pid=pid))["exited"]:
            assert time.monotonic() < end, f"no end of: {script}"
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
        out, err = (
            base64.b64decode(status.get(key, "")).decode("utf-8", "replace") for key in ("out-data", "err-data")
        )
        done = Done(status.get("exitcode", -status.get("signal", 0)), out, err)
        assert not check or done.code == 0, f"{script}\nended with {done.code}\n{done.all}"
        return done

    def reboot(self) -> None:
        """Restart it as an operator does, and wait until it has started."""
        self.run("systemd-run --quiet --on-active=1 systemctl reboot")
        try:
            self._qemu.wait(BOOT)  # -no-reboot: the end of the system is the end of QEMU
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the machine does not shut down: {self.console}") from None
        self._start()

    def _end(self) -> None:
        self._qemu.kill()
        self._qemu.wait()

    def close(self) -> None:
        """End it."""
        if self._sock:
            self._sock.close()
            self._lines.close()
        self._stack.close()
