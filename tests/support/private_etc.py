"""Accounts and PAM services of a test's own: a copy of /etc in a mount namespace, in which the real tools work.

Nothing of this machine changes: `useradd`, `chpasswd` and others run in the namespace.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

#: As the package has it.
SERVICE = (Path(__file__).parent.parent.parent / "packaging/debian/agent-dispatcher.dispatcher.pam").read_text()
_HOLD = """
mount --bind "$1" /etc
echo ready
exec cat  # until the test closes the pipe
"""


class PrivateEtc:
    """The namespace; a context manager.

    :param directory: where the copy goes.
    """

    def __init__(self, directory: Path) -> None:
        self.etc = directory / "etc"
        shutil.copytree("/etc", self.etc, symlinks=True, copy_function=shutil.copy2)
        for name, mode in (("shadow", 0o640), ("gshadow", 0o640)):
            (self.etc / name).chmod(mode)
        self.service("dispatcher", SERVICE)
        self._holder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrivateEtc:
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _HOLD, "sh", self.etc],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout and self._holder.stdout.readline() == b"ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._holder and self._holder.stdin and self._holder.stdout
        self._holder.stdin.close()
        self._holder.wait(10)
        self._holder.stdout.close()

    @property
    def inside(self) -> list[str]:
        """What is put before a command that is to run in the namespace."""
        assert self._holder
        return ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "--"]

    def run(self, *command: str, stdin: str = "") -> None:
        done = subprocess.run(
            [*self.inside, *command], input=stdin.encode(), capture_output=True, check=False, env=os.environ
        )
        assert done.returncode == 0, (command, done.stderr.decode())

    def service(self, name: str, text: str) -> Path:
        """Write the file of a PAM service."""
        file = self.etc / "pam.d" / name
        file.write_text(text)
        return file

    def add(self, name: str, password: str, *options: str) -> None:
        """Add a user; the hash is a cheap one."""
        self.run("useradd", "--no-create-home", *options, name)
        self.run("chpasswd", "--crypt-method", "SHA512", "--sha-rounds", "1000", stdin=f"{name}:{password}\n")

    def use(self, monkeypatch) -> None:
        """Let the authenticator's helper run in the namespace."""
        from dispatcher_pam import authenticator

        monkeypatch.setattr(authenticator, "HELPER", (*self.inside, *authenticator.HELPER))
