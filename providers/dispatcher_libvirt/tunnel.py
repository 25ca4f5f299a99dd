"""Agents of another host: one ssh connection, and a local Unix socket for each agent."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from dispatcher.plugin import (
    Deadline,
    DeadlineExceeded,
    Endpoint,
    Handle,
    Observation,
    SshMultiplexer,
    Unavailable,
)

_TIMEOUT = 15.0


class Tunnels:
    """Tunnels to the machines on the host of a ``qemu+ssh://`` URI.

    :param directory: for the control socket; private to the manager.
    """

    def __init__(self, uri: str, directory: Path) -> None:
        program, options, host = ssh_arguments(uri)
        self._ssh = SshMultiplexer(host, directory / "ssh", options=options, program=program)

    def apply(self, handle: Handle, seen: Observation, deadline: Deadline) -> Observation:
        """Return an observation with the local end of a tunnel as its endpoint.

        :raises Unavailable: the host is unreachable.
        """
        local, gid = handle.data.get("socket"), handle.data.get("proxy")
        if seen.endpoint is None or not isinstance(local, str):
            return seen
        new = self._ssh.forward(local, f"{seen.endpoint.host}:{seen.endpoint.port}", deadline.bounded(_TIMEOUT))
        if new and os.geteuid() == 0 and isinstance(gid, int):
            os.chown(local, -1, gid, follow_symlinks=False)
        return replace(seen, endpoint=Endpoint.unix(local), owner_uid=os.geteuid())

    def remove(self, handle: Handle) -> None:
        """Remove an agent's tunnel, and with the last one the connection.  Absent is success."""
        local = handle.data.get("socket")
        if not isinstance(local, str):
            return
        with contextlib.suppress(Unavailable, DeadlineExceeded):
            self._ssh.cancel(local, Deadline(_TIMEOUT))
            if not self._ssh.forwards:
                self._ssh.close(Deadline(_TIMEOUT))


def ssh_arguments(uri: str) -> tuple[str, list[str], str]:
    """Return the program, options and destination of ssh for a libvirt URI."""
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
    return query.get("command", "ssh"), options, parts.hostname or ""
