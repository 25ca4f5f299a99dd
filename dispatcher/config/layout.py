"""Paths of an installation's files, derived from the configuration.

RUN_DIR/   manager.sock proxy.sock feed.sock   the manager's listeners
           proxy/portal.sock                   the portal, private to the proxy
           a/HASH/s                            endpoint of an agent, directory 2710 AGENT:PROXY
           p/PROVIDER/                         private to a provider, emptied at boot
STATE_DIR/ dispatcher.db secrets/              database, generated keys
           agents/KEY/data                     canonical data, owned by the agent's user id
           agents/KEY/log                      log files of providers, owned by the manager
           agents/KEY/copies/                  old copies of data after moves
           providers/PROVIDER/                 private to a provider
"""

from __future__ import annotations

from pathlib import Path

from dispatcher.config.default_paths import MANAGER_SOCKET, PROXY_LOCK
from dispatcher.config.load import Config
from dispatcher.plugin import names
from dispatcher.plugin.errors import ConfigError

MAX_SOCKET_PATH = 107


class Paths:
    """All paths of one installation."""

    def __init__(self, run_dir: Path, state_dir: Path) -> None:
        self.run_dir = run_dir
        self.manager_socket = run_dir / MANAGER_SOCKET
        self.proxy_socket = run_dir / "proxy.sock"
        self.feed_socket = run_dir / "feed.sock"
        self.proxy_dir = run_dir / "proxy"
        self.portal_socket = self.proxy_dir / "portal.sock"
        self.proxy_lock = run_dir / PROXY_LOCK
        self.state_dir = state_dir
        self.database = state_dir / "dispatcher.db"
        self.secrets_dir = state_dir / "secrets"  # mode 0700

    @classmethod
    def of(cls, config: Config) -> Paths:
        """Return the paths of a configuration.

        :raises ConfigError: `manager.run_dir` is too long for the path of a Unix socket.
        """
        paths = cls(config.manager.run_dir.absolute(), config.manager.state_dir.absolute())
        longest = max(len(str(paths.endpoint_dir("x") / "s")), len(str(paths.portal_socket)))
        if longest > MAX_SOCKET_PATH:
            raise ConfigError(
                "manager.run_dir is too long",
                why=f"a socket's path would have {longest} bytes; the kernel's limit is {MAX_SOCKET_PATH}",
                fix="choose a shorter directory",
            )
        return paths

    def endpoint_dir(self, agent: str) -> Path:
        """Return the directory of an agent's Unix endpoint."""
        return self.run_dir / "a" / names.digest(agent)

    def agent_dir(self, agent: str) -> Path:
        """Return the directory of an agent's data, logs and copies."""
        return self.state_dir / "agents" / names.key(agent)

    def provider_state(self, provider: str) -> Path:
        """Return a provider's directory that survives reboots."""
        return self.state_dir / "providers" / provider

    def provider_run(self, provider: str) -> Path:
        """Return a provider's directory that is emptied at boot."""
        return self.run_dir / "p" / provider
