"""Networks of agents: none, private (outbound through pasta or slirp4netns) or the host's."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network

from dispatcher.clock import Deadline
from dispatcher.errors import ConfigError, Unsupported
from dispatcher.model import App, Network
from dispatcher_subprocess.machine import Machine
from dispatcher_subprocess.record import Process


def verify(app: App, kind: str, machine: Machine) -> None:
    """Check that an app's network is possible here.

    :raises ConfigError: never with this app; :raises Unsupported: not on this host.
    """
    if kind == "tcp" and app.network is Network.NONE and machine.sandboxed:
        raise ConfigError(
            f'apps.{app.name}: {{port}} cannot be reached with network = "none"',
            why="nothing leads into a sandbox without a network",
            fix='use {socket} in the command, or network = "private"',
        )
    if app.network is Network.PRIVATE:
        raise Unsupported("No private network here")


def resolver() -> bytes:
    """Return the content of /etc/resolv.conf for a private network."""
    return b""


def connect(
    machine: Machine, inner: Process, port: int, denied: Sequence[IPv4Network | IPv6Network], deadline: Deadline
) -> Process:
    """Connect a waiting agent's network namespace with the outside."""
    raise Unsupported("No private network here")
