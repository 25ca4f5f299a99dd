"""A real sshd on a loopback port, with keys of its own, for tests of what goes through ssh."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from dispatcher.testing.kit import eventually


class Sshd:
    """The server, and the settings with which a client reaches it."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="sshd-", dir="/tmp"))
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.directory / name], check=True
            )
        shutil.copy(self.directory / "user.pub", self.directory / "authorized")
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        (self.directory / "config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.directory}/host\nPidFile none\n"
            f"AuthorizedKeysFile {self.directory}/authorized\nStrictModes no\nPasswordAuthentication no\n"
            "UsePAM no\nPermitRootLogin prohibit-password\nAllowStreamLocalForwarding yes\n"
        )
        key = (self.directory / "host.pub").read_text().split()[:2]
        (self.directory / "known").write_text(f"[127.0.0.1]:{self.port} {' '.join(key)}\n")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def options(self) -> list[str]:
        """Options of ssh for a client that may sign in."""
        known = f"UserKnownHostsFile={self.directory}/known"
        return ["-F", "none", "-i", f"{self.directory}/user", "-o", known]

    def start(self) -> None:
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                ["/usr/sbin/sshd", "-D", "-e", "-f", str(self.directory / "config")],
                stderr=log,
                start_new_session=True,
            )
        assert eventually(self._listens, 20)

    def _listens(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        """End the listener and every connection."""
        assert self.process
        for pid in self._family(self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _family(self, root: int) -> list[int]:
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = entry.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
        found, new = [], [root]
        while new:
            found += new
            new = [child for pid in new for child in children.get(pid, ())]
        return found

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)
