"""Encrypted ways to machines of another host: one ssh connection, a local Unix socket for each agent.

Touches ssh processes and sockets.  The connection's master outlives the manager, so that agents go on being
served; the next manager finds it by its control socket.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from dispatcher.plugin import Deadline, DeadlineExceeded, Endpoint, Handle, Observation, Unavailable, boottime
from dispatcher_libvirt import sandbox

_PATIENCE = 15.0
_LOOK = 5.0  # seconds between two looks at whether the connection is up
_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


class Tunnels:
    """Ways to the machines of the host that a ``qemu+ssh://`` URI names.

    :param directory: for the control socket; private to the manager.
    """

    def __init__(self, uri: str, directory: Path) -> None:
        self._control = directory / "ssh"
        self._program, self._arguments, self._host = arguments(uri)
        self._lock = threading.Lock()
        self._looked = -_LOOK
        self._known: dict[str, str] = {}  # agent's socket -> where it leads

    def apply(self, handle: Handle, seen: Observation, deadline: Deadline) -> Observation:
        """Return an observation whose endpoint is the near end of a way to the far one.

        :raises Unavailable: the host cannot be reached.
        """
        local = handle.data.get("socket")
        if seen.endpoint is None or not isinstance(local, str):
            return seen
        far = f"{seen.endpoint.host}:{seen.endpoint.port}"
        with self._lock:
            self._look(deadline)
            if self._known.get(local) != far or not Path(local).is_socket():
                self._forward(local, far, deadline)
                gid = handle.data.get("proxy")
                if os.geteuid() == 0 and isinstance(gid, int):
                    os.chown(local, -1, gid, follow_symlinks=False)
                self._known[local] = far
        return Observation(
            state=seen.state,
            endpoint=Endpoint.unix(local),
            owner_uid=os.geteuid(),
            started_at=seen.started_at,
            spec_hash=seen.spec_hash,
            exit_reason=seen.exit_reason,
            detail=seen.detail,
        )

    def remove(self, handle: Handle) -> None:
        """Take an agent's way down.  Absent is success."""
        local = handle.data.get("socket")
        if not isinstance(local, str):
            return
        with self._lock:
            far = self._known.pop(local, "")
            if far and self._control.exists():
                with contextlib.suppress(Unavailable, DeadlineExceeded):
                    self._ssh(["-O", "cancel", "-L", f"{local}:{far}"], Deadline(_PATIENCE))
            with contextlib.suppress(FileNotFoundError):
                Path(local).unlink()
            if not self._known:
                self.close(last=True)

    def close(self, *, last: bool = False) -> None:
        """End the connection when no agent needs it any more (`last`); otherwise it stays."""
        if last and self._control.exists():
            with contextlib.suppress(Unavailable, DeadlineExceeded):
                self._ssh(["-O", "exit"], Deadline(_PATIENCE))
            self._looked = -_LOOK

    def _look(self, deadline: Deadline) -> None:
        """See that the connection's master is there, now and then that it works; make it where it is not."""
        if boottime() - self._looked < _LOOK and self._is_there():
            return
        try:
            self._ssh(["-O", "check"], deadline)
        except Unavailable:
            self._known.clear()
            with contextlib.suppress(FileNotFoundError):
                self._control.unlink()
            self._ssh(["-M", "-f", "-N"], deadline)
        self._looked = boottime()

    def _is_there(self) -> bool:
        """Whether a master listens: one that died left all its sockets, and the agents' ones refuse."""
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(self._control))
            except OSError:
                return False
        return True

    def _forward(self, local: str, far: str, deadline: Deadline) -> None:
        # One that an earlier manager asked for is not made again, and its socket may lead elsewhere.
        with contextlib.suppress(Unavailable, DeadlineExceeded):
            self._ssh(["-O", "cancel", "-L", f"{local}:{far}"], deadline)
        with contextlib.suppress(FileNotFoundError):
            Path(local).unlink()
        self._ssh(["-O", "forward", "-L", f"{local}:{far}"], deadline)

    def _ssh(self, what: list[str], deadline: Deadline) -> None:
        command = [
            self._program or sandbox.tool("ssh"),
            "-S",
            str(self._control),
            *_OPTIONS,
            *self._arguments,
            *what,
            "--",
            self._host,
        ]
        try:
            with tempfile.TemporaryFile() as said:  # not a pipe: the master keeps it open for as long as it lives
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    check=False,
                    timeout=max(0.1, min(_PATIENCE, deadline.remaining())),
                    start_new_session=True,
                )
                said.seek(0)
                words = " ".join(said.read().decode(errors="replace").split())[-300:]
        except subprocess.TimeoutExpired as error:
            raise DeadlineExceeded(
                f"The host {self._host} did not answer in time", fix="see whether ssh works for the manager's user"
            ) from error
        if done.returncode:
            raise Unavailable(
                f"The host {self._host} cannot be reached through ssh",
                why=words or f"ssh ended with {done.returncode}",
                fix=f"see whether `ssh {self._host}` works for the manager's user, without a question",
            )


_OPTIONS = [
    "-o",
    "BatchMode=yes",
    "-o",
    "ExitOnForwardFailure=yes",
    "-o",
    "StreamLocalBindUnlink=yes",
    "-o",
    "StreamLocalBindMask=0117",
    "-o",
    "ServerAliveInterval=15",
]


def arguments(uri: str) -> tuple[str, list[str], str]:
    """Return ssh's program ("" for the usual one), options and destination for a libvirt URI.

    libvirt has its own names for some of them.
    """
    parts = urlsplit(uri)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    options: list[str] = []
    if parts.port:
        options += ["-p", str(parts.port)]
    if parts.username:
        options += ["-l", parts.username]
    if "keyfile" in query:
        options += ["-i", query["keyfile"]]
    if "known_hosts" in query:
        options += ["-o", f"UserKnownHostsFile={query['known_hosts']}"]
    if query.get("no_verify") == "1":
        options += ["-o", "StrictHostKeyChecking=no"]
    return query.get("command", ""), options, parts.hostname or ""
