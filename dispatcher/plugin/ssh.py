"""One ssh connection to another host, with local Unix sockets that lead to sockets and ports there.

For providers whose backend runs on another host: the backend's own socket and the agents' ports go through one
encrypted connection.  Its master process (OpenSSH's ControlMaster) outlives this process, so agents stay reachable
while the manager restarts; the next instance finds the master by its control socket.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DeadlineExceeded, Unavailable
from dispatcher.plugin.model import Endpoint, Observation

_OPTIONS = (
    "BatchMode=yes",
    "ExitOnForwardFailure=yes",
    "StreamLocalBindUnlink=yes",
    "StreamLocalBindMask=0117",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "ConnectTimeout=10",
    "ControlPersist=no",
    "ForwardAgent=no",
    "ForwardX11=no",
)
#: Seconds for a command to the master, which is a local process.
_COMMAND_SECONDS = 10.0


class SshMultiplexer:
    """The connection to one host.  Thread-safe; connects at the first `ensure` or `forward`.

    A lost connection is made again by the next call, without its forwards: `forward` again what is needed.

    :param destination: ``HOST`` or ``USER@HOST``, as ssh takes it.
    :param control: path of the control socket; short, in a directory of its own that is made with mode 0700.
    :param options: further options of ssh, such as ``("-p", "2222")``; :param program: ssh, or a command like it.
    """

    def __init__(
        self, destination: str, control: Path, *, options: Sequence[str] = (), program: str = "ssh"
    ) -> None:
        self.destination = destination
        self._control = control
        self._command = [program, "-S", str(control)]
        for option in _OPTIONS:
            self._command += ["-o", option]
        self._command += options
        self._lock = threading.Lock()
        self._master: tuple[int, str] | None = None  # process id, start time
        self._forwards: dict[str, str] = {}

    @property
    def pid(self) -> int:
        """Process id of the master; 0 if this instance knows none that runs."""
        master = self._master
        return master[0] if master and _start_time(master[0]) == master[1] else 0

    @property
    def forwards(self) -> dict[str, str]:
        """The local sockets that this instance forwards, with their targets."""
        return dict(self._forwards)

    def ensure(self, deadline: Deadline) -> None:
        """Connect, unless the connection is up.

        :raises Unavailable: ssh cannot connect; :raises DeadlineExceeded: not in time.
        """
        if not self.pid:
            with self._locked(deadline):
                self._ensure(deadline)

    def forward(self, local: str, target: str, deadline: Deadline) -> bool:
        """Make connections to the Unix socket `local` arrive at `target`; return whether the socket is new.

        The socket has mode 0660, and its directory's group if that is set-group-id.

        :param target: ``HOST:PORT`` or the path of a Unix socket, as the other host sees it.
        :raises Unavailable: there is no connection, or the host refuses it; :raises DeadlineExceeded: not in time.
        """
        if self._is_forwarded(local, target):
            return False
        with self._locked(deadline):
            self._ensure(deadline)
            if self._is_forwarded(local, target):
                return False
            # An earlier instance may have asked the same master: a second request would be ignored.
            self._cancel(local, self._forwards.pop(local, target), deadline)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(local)
            self._run(["-O", "forward", "-L", f"{local}:{target}"], deadline.bounded(_COMMAND_SECONDS))
            self._forwards[local] = target
        return True

    def redirect(self, seen: Observation, local: str, deadline: Deadline) -> Observation:
        """Forward an agent's TCP endpoint; return its observation with the endpoint of this side."""
        if seen.endpoint is None or seen.endpoint.kind != "tcp":
            return seen
        self.forward(local, f"{seen.endpoint.host}:{seen.endpoint.port}", deadline)
        return replace(seen, endpoint=Endpoint.unix(local), owner_uid=os.geteuid())

    def cancel(self, local: str, deadline: Deadline) -> None:
        """Stop forwarding a socket and remove it; absent is success.  Open connections stay."""
        with self._locked(deadline):
            target = self._forwards.pop(local, None)
            if target and self.pid:
                self._cancel(local, target, deadline)
            with contextlib.suppress(OSError):
                os.unlink(local)

    def close(self, deadline: Deadline) -> None:
        """End the connection and all forwards; without a connection this is success."""
        with self._locked(deadline):
            if self._adopt(deadline):
                with contextlib.suppress(Unavailable):
                    self._run(["-O", "exit"], deadline.bounded(_COMMAND_SECONDS))
            self._master = None
            self._forwards.clear()

    def _locked(self, deadline: Deadline) -> contextlib.AbstractContextManager[None]:
        what = f"ssh to {self.destination} did not answer in time"
        return deadline.holding(self._lock, what, why="another call waits for it")

    def _ensure(self, deadline: Deadline) -> None:
        if self.pid:
            return
        self._forwards.clear()
        if self._adopt(deadline):
            return
        self._control.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._control.unlink(missing_ok=True)
        self._run(["-M", "-N", "-T", "-f"], deadline)
        if not self._adopt(deadline):
            raise Unavailable(f"The connection to {self.destination} ended at once", fix=self._fix, retry_after=5)

    def _adopt(self, deadline: Deadline) -> bool:
        """Find the process that listens on the control socket: it may be an earlier instance's."""
        if not self._control.is_socket():
            return False
        try:
            output = self._run(["-O", "check"], deadline.bounded(_COMMAND_SECONDS))
        except DeadlineExceeded:
            raise
        except Unavailable:
            return False
        found = re.search(r"pid=(\d+)", output)
        pid = int(found[1]) if found else 0
        started = _start_time(pid)
        self._master = (pid, started) if started else None
        return bool(started)

    def _is_forwarded(self, local: str, target: str) -> bool:
        if self._forwards.get(local) != target or not self.pid:
            return False
        try:
            return stat.S_ISSOCK(os.lstat(local).st_mode)
        except OSError:
            return False

    def _cancel(self, local: str, target: str, deadline: Deadline) -> None:
        with contextlib.suppress(Unavailable):  # the master does not know it
            self._run(["-O", "cancel", "-L", f"{local}:{target}"], deadline.bounded(_COMMAND_SECONDS))

    def _run(self, arguments: list[str], deadline: Deadline) -> str:
        """Run ssh and return its output; a temporary file takes it, as the master would keep a pipe open."""
        command = [*self._command, *arguments, "--", self.destination]
        with tempfile.TemporaryFile() as file:
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=max(0.1, deadline.remaining()),
                    check=False,
                    start_new_session=True,
                )
            except OSError as error:
                raise Unavailable(
                    f"The host {self.destination} cannot be reached",
                    why=f"{command[0]}: {error.strerror}",
                    fix="install openssh-client",
                ) from error
            except subprocess.TimeoutExpired as error:
                raise DeadlineExceeded(
                    f"ssh to {self.destination} did not answer in time", why=_read(file), fix=self._fix
                ) from error
            output = _read(file)
        if done.returncode:
            raise Unavailable(
                f"The host {self.destination} cannot be reached through ssh",
                why=output or f"ssh exited with status {done.returncode}",
                fix=self._fix,
                retry_after=5,
            )
        return output

    @property
    def _fix(self) -> str:
        return (
            f"as the manager's user, `ssh {self.destination} true` must work without a question"
            " (keys and known_hosts are that user's)"
        )


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return " ".join(file.read().decode(errors="replace").split())[-400:]


def _start_time(pid: int) -> str:
    """Return when a process started, "" if it does not run: with the process id, this names one process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
