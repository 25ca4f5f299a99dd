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

from dataclasses import dataclass
from pathlib import Path

from dispatcher.config.load import Config
from dispatcher.plugin import names
from dispatcher.plugin.errors import ConfigError

MAX_SOCKET_PATH = 107


@dataclass(frozen=True, slots=True)
class Paths:
    """All paths of one installation."""

    run_dir: Path
    state_dir: Path

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

    @property
    def manager_socket(self) -> Path:
        """Socket of the administration interface."""
        return self.run_dir / "manager.sock"

    @property
    def proxy_socket(self) -> Path:
        """Socket of the proxy's interface."""
        return self.run_dir / "proxy.sock"

    @property
    def feed_socket(self) -> Path:
        """Socket of the feed for edge workers."""
        return self.run_dir / "feed.sock"

    @property
    def proxy_dir(self) -> Path:
        """Private directory of the proxy."""
        return self.run_dir / "proxy"

    @property
    def portal_socket(self) -> Path:
        """Socket of the portal."""
        return self.proxy_dir / "portal.sock"

    @property
    def database(self) -> Path:
        """The default SQLite file."""
        return self.state_dir / "dispatcher.db"

    @property
    def secrets_dir(self) -> Path:
        """Generated keys and certificates; mode 0700."""
        return self.state_dir / "secrets"

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
