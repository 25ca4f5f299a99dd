"""All backends of the installation, by name; each is loaded at its first use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from dispatcher.config.host_users import HostAccounts
from dispatcher.config.layout import Paths
from dispatcher.config.load import Config
from dispatcher.config.plugins import Plugins
from dispatcher.manager.backends.backend import Backend
from dispatcher.manager.files.agent_dirs import provider_dirs
from dispatcher.plugin.provider import ProviderContext


class Backends:
    """The backends, made from the configuration and the plugins."""

    def __init__(
        self, *, config: Config, plugins: Plugins, paths: Paths, accounts: HostAccounts, installation: str
    ) -> None:
        self._plugins = plugins
        self._paths = paths
        self._accounts = accounts
        self._installation = installation
        self.config = config
        self._known: dict[str, Backend] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Backend]:
        return iter(list(self._known.values()))

    def get(self, name: str) -> Backend:
        """Return a backend; it may be unusable."""
        backend = self._known.get(name)
        if backend is None:
            with self._lock:
                backend = self._known.get(name)
                if backend is None:
                    backend = Backend(name, self.config.manager.provider_threads)
                    self._load(backend)
                    self._known[name] = backend
        return backend

    def reload(self, name: str) -> Callable[[], None]:
        """Make a provider's instance again, with the present configuration; return what closes the old one."""
        return self._load(self.get(name))

    def _load(self, backend: Backend) -> Callable[[], None]:
        state_dir, run_dir = provider_dirs(self._paths, backend.name)
        return backend.load(
            self.config,
            self._plugins,
            ProviderContext(
                installation=self._installation,
                state_dir=state_dir,
                run_dir=run_dir,
                proxy_gid=self._accounts.proxy_gid,
                privileged=self._accounts.agent_uids is not None,
                log=logging.getLogger(f"dispatcher.plugin.provider.{backend.name}"),
            ),
        )
