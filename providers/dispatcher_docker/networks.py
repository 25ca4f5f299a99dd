"""The bridge network that an installation's agents share.

Agents on it cannot reach each other (`enable_icc=false`).  Docker does let containers connect to the host's own
services.  Where the manager is root on the engine's host, one firewall rule per bridge prevents that: new
connections from the bridge to the host are rejected.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dispatcher.plugin import Deadline, DeadlineExceeded, ProviderContext, ProviderError
from dispatcher_docker.containers import LABEL, network_name
from dispatcher_docker.errors import NoSuchObject
from dispatcher_docker.host import Engine


class Networks:
    """Makes and removes the bridge of one installation."""

    def __init__(self, engine: Engine, context: ProviderContext) -> None:
        self._engine = engine
        self._context = context
        self._lock = threading.Lock()
        self._starting = 0
        self.name = network_name(context.installation)
        #: Name of the bridge's interface: at most 15 characters.
        self.interface = f"dsp-{context.installation}"

    @contextmanager
    def in_use(self, deadline: Deadline) -> Iterator[None]:
        """Make the bridge, and keep it for the length of a start."""
        with self._locked(deadline):
            self._ensure(deadline)
            self._starting += 1
        try:
            yield
        finally:
            with self._lock:
                self._starting -= 1

    @contextmanager
    def _locked(self, deadline: Deadline) -> Iterator[None]:
        if not self._lock.acquire(timeout=deadline.remaining()):
            raise DeadlineExceeded(
                "The network of this installation was not ready in time",
                why="another start or removal holds it",
                fix="check whether the engine hangs (docker info)",
            )
        try:
            yield
        finally:
            self._lock.release()

    def _ensure(self, deadline: Deadline) -> None:
        try:
            with self._engine.call("look for the network of this installation", deadline) as client:
                client.inspect_network(self.name)
        except NoSuchObject:
            with self._engine.call("create the network of this installation", deadline) as client:
                client.create_network(
                    self.name,
                    driver="bridge",
                    options={
                        "com.docker.network.bridge.enable_icc": "false",
                        "com.docker.network.bridge.name": self.interface,
                    },
                    labels={f"{LABEL}installation": self._context.installation},
                    check_duplicate=True,
                )
        if self.can_protect_host:
            self._protect(deadline)

    @property
    def can_protect_host(self) -> bool:
        """Whether the rule that keeps agents from the host's services can be set here."""
        return self._engine.is_local and self._context.privileged and shutil.which("iptables") is not None

    def _rule(self, action: str) -> list[str]:
        match = ["-i", self.interface, "-m", "conntrack", "--ctstate", "NEW,INVALID"]
        return ["iptables", "--wait", "5", action, "INPUT", *match, "-j", "REJECT"]

    def _protect(self, deadline: Deadline) -> None:
        seconds = max(0.1, min(10.0, deadline.remaining()))
        try:
            known = subprocess.run(self._rule("-C"), capture_output=True, check=False, timeout=seconds)
            if known.returncode:
                subprocess.run(self._rule("-I"), capture_output=True, check=True, timeout=seconds)
        except (OSError, subprocess.SubprocessError) as error:
            why = getattr(error, "stderr", b"") or str(error).encode()
            raise ProviderError(
                "This host's services cannot be protected from agents",
                why=why.decode(errors="replace").strip(),
                fix='let the manager run iptables, or use network = "none"',
            ) from error

    def remove_unused(self, deadline: Deadline) -> None:
        """Remove the bridge and its rule if the installation has no containers left."""
        with self._locked(deadline):
            if self._starting:
                return
            with self._engine.call("look for containers of this installation", deadline) as client:
                label = f"{LABEL}installation={self._context.installation}"
                if client.containers(all=True, quiet=True, limit=1, filters={"label": [label]}):
                    return
            try:
                with self._engine.call("remove the network of this installation", deadline) as client:
                    client.remove_network(self.name)
            except NoSuchObject:
                return
            if self.can_protect_host:
                subprocess.run(self._rule("-D"), capture_output=True, check=False, timeout=10)
