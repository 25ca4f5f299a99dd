"""What this host keeps for a container that runs: its secrets, its socket.  Touches run_dir and a tmpfs."""

from __future__ import annotations

import contextlib
import os

from dispatcher.plugin import Deadline, Handle, ProviderContext
from dispatcher_docker.engine import Engine
from dispatcher_docker.secretfiles import SecretFiles


class ThisSide:
    """The manager's side of an agent.

    :ivar secrets: the agents' secrets.
    """

    def __init__(self, engine: Engine, context: ProviderContext) -> None:
        self._engine = engine
        self.secrets = SecretFiles(context)

    def clear(self, handle: Handle, deadline: Deadline) -> None:
        """Remove the secrets and the socket of a container that does not run."""
        self.secrets.remove(handle.name)
        run_dir = handle.data.get("run_dir")
        if not isinstance(run_dir, str):
            return
        if self._engine.tunnel:
            self._engine.tunnel.ssh.cancel(f"{run_dir}/s", deadline)
        try:
            directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return
        try:
            with contextlib.suppress(OSError):
                os.unlink("s", dir_fd=directory)
        finally:
            os.close(directory)
