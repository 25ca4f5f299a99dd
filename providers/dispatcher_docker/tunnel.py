"""An engine behind ``ssh://``: the engine's socket and the agents' ports through one connection.

docker-py's own ssh has no deadlines.  A forwarded Unix socket is an engine like any other.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dispatcher.plugin import ConfigError, Deadline, Endpoint, Handle, Observation, SshMultiplexer

_REMOTE_SOCKET = "/var/run/docker.sock"


class Tunnel:
    """The connection to the engine's host.

    :param url: ``ssh://[USER@]HOST[:PORT][/PATH/OF/THE/SOCKET]``; :param directory: private, with a short path.
    :ivar socket: the engine's socket on this side.
    """

    def __init__(self, url: str, directory: Path) -> None:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if not host or host.startswith("-") or (parts.username or "").startswith("-") or parts.password:
            raise ConfigError(
                f"Bad url of the Docker engine {url!r}",
                fix="write ssh://USER@HOST, the key in ssh's configuration",
            )
        here = directory / hashlib.sha256(url.encode()).hexdigest()[:8]
        self.socket = here / "engine"
        self._remote = unquote(parts.path) if parts.path not in {"", "/"} else _REMOTE_SOCKET
        self.ssh = SshMultiplexer(
            f"{unquote(parts.username)}@{host}" if parts.username else host,
            here / "control",
            options=["-p", str(parts.port)] if parts.port else [],
        )

    def connect(self, deadline: Deadline) -> None:
        """Forward the engine's socket.

        :raises Unavailable: ssh cannot connect.
        """
        self.ssh.forward(str(self.socket), self._remote, deadline)

    def forward(self, handle: Handle, seen: Observation, deadline: Deadline) -> Observation:
        """Forward an agent's port; return the observation with the endpoint on this side."""
        run_dir = handle.data.get("run_dir")
        if seen.endpoint is None or seen.endpoint.kind != "tcp" or not isinstance(run_dir, str):
            return seen
        path = f"{run_dir}/s"
        self.ssh.forward(path, f"{seen.endpoint.host}:{seen.endpoint.port}", deadline)
        return replace(seen, endpoint=Endpoint.unix(path), owner_uid=os.geteuid())
