"""Accounts and PAM services of a test's own: a copy of /etc in a mount namespace, in which the real tools work.

Nothing of this machine changes: `useradd`, `chpasswd` and others run in the namespace.
"""

from __future__ import annotations

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
        subprocess.run(["cp", "-a", "/etc", self.etc], check=True)
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
        done = subprocess.run([*self.inside, *command], input=stdin, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)

    def service(self, name: str, text: str) -> Path:
        """Write the file of a PAM service."""
        file = self.etc / "pam.d" / name
        file.write_text(text)
        return file

    def add(self, name: str, password: str, *options: str) -> None:
        """Add a user; the hash is a cheap one."""
        self.run("useradd", "--no-create-home", *options, name)
        self.run("chpasswd", "--crypt-method", "SHA512", "--sha-rounds", "1000", stdin=f"{name}:{password}\n")

    def use(self, monkeypatch, uid: int = 0) -> None:
        """Let the authenticator's helper run in the namespace, as that user."""
        from dispatcher_pam import authenticator, helper

        program = self.etc / "helper.py"  # the clone may be where only root may read
        program.write_bytes(Path(helper.__file__).read_bytes())
        as_user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        python = ["/usr/bin/python3", *authenticator.FLAGS, "/etc/helper.py"]
        monkeypatch.setattr(authenticator, "HELPER", (*self.inside, *as_user, *python))

    def name_service(self, name: str = "") -> None:
        """Ask a service of that name, which is down, for accounts that are not in files; "": none."""
        preload, switch = self.etc / "ld.so.preload", self.etc / "nsswitch.conf"
        preload.unlink(missing_ok=True)
        if name:
            code = f"""
                #include <errno.h>
                int _nss_{name}_getpwnam_r(const char *n, void *p, char *b, unsigned long s, int *e) {{
                    *e = errno = ECONNREFUSED;
                    return -1;
                }}"""
            library = f"libnss_{name}.so.2"
            options = ["-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", self.etc / library, "-x", "c", "-"]
            subprocess.run(["gcc", *options], input=code, text=True, check=True)
            preload.write_text(f"/etc/{library}\n")  # so that it is found by its name
        switch.write_text(f"passwd: files {name}\ngroup: files\nshadow: files\n")

    def module(self) -> str:
        """Compile `misbehaving.c`; return the module's path in the namespace."""
        source = Path(__file__).with_name("pam_misbehaving.c")
        command = ["gcc", "-shared", "-fPIC", "-o", self.etc / "misbehaving.so", source, "-l:libpam.so.0"]
        subprocess.run(command, check=True)
        return "/etc/misbehaving.so"
