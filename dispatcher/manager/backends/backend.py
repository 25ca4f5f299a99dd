"""The backends: each has a provider's instance, its threads, and whether it answers.

A provider that cannot be loaded is an unusable backend, with the reason; its agents stay known.
"""

from __future__ import annotations

import enum
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from dispatcher.common.contained import PluginRef, at_once, bounded, instance
from dispatcher.config.host_users import HostAccounts
from dispatcher.config.layout import Paths
from dispatcher.config.load import Config
from dispatcher.config.plugins import Plugins
from dispatcher.manager.backends.contained_provider import ContainedProvider
from dispatcher.manager.backends.pool import Pool, SingleFlight, hung_call
from dispatcher.manager.backends.preparation import Preparations
from dispatcher.manager.files.agent_dirs import provider_dirs
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError, PluginError, ProviderError
from dispatcher.plugin.model import App, Capability, Handle, Usage
from dispatcher.plugin.provider import Closeable, Progress, ProviderContext

USAGE_TIME = 5.0  # seconds; a backend that has not answered by then is left out

_T = TypeVar("_T")
_log = logging.getLogger("dispatcher.manager")


class Contact(enum.Enum):
    """Whether a backend answers, and whether it has since this manager began."""

    NOT_CALLED = enum.auto()
    NEVER_ANSWERED = enum.auto()
    ANSWERS = enum.auto()
    LOST = enum.auto()


@dataclass(frozen=True)
class Made:
    """A provider's instance, or why there is none."""

    plugin: PluginRef
    provider: ContainedProvider | None
    capabilities: frozenset[Capability] = frozenset()
    problem: DispatcherError | None = None


class Backend:
    """One provider, its threads, and whether it answers.

    :ivar loaded: whether it was tried to make its provider; :ivar loading: held meanwhile.
    :ivar plugin: how errors name the provider.
    :ivar contact: whether it answers; :ivar since: when that began; :ivar last_contact: when it last answered;
        :ivar problem: why it does not.
    :ivar listing: the list of its agents; :ivar losses: lists in a row that failed; :ivar retry: a further one
        is scheduled.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.pool = Pool(f"dispatcher-{name}", threads)
        self.preparations = Preparations(name)
        self.loading = threading.Lock()
        self.loaded = False
        self._provider: ContainedProvider | None = None
        self._watch: Closeable | None = None
        self.capabilities: frozenset[Capability] = frozenset()
        self.plugin = PluginRef("provider", name)
        self.contact = Contact.NOT_CALLED
        self.since: float | None = None
        self.last_contact: float | None = None
        self.problem: DispatcherError = PluginError(f"The provider {name} has not been called yet")
        self.listing = SingleFlight()
        self.losses = 0
        self.retry = SingleFlight()

    @property
    def reachable(self) -> bool:
        """Whether it answered when it was last called."""
        return self.contact is Contact.ANSWERS

    @property
    def provider(self) -> ContainedProvider:
        """The contained provider.

        :raises DispatcherError: it could not be loaded.
        """
        if self._provider is None:
            raise self.problem
        return self._provider

    @property
    def usable(self) -> bool:
        """Whether the plugin was loaded."""
        return self._provider is not None

    def use(self, made: Made) -> Callable[[], None]:
        """Use an instance from now on, if it could be made; return what closes the earlier one."""
        self.plugin, before, watched = made.plugin, self._provider, self._watch
        if made.provider is None:
            self.problem = made.problem or self.problem
            return lambda: None
        self._provider, self._watch, self.capabilities = made.provider, None, made.capabilities
        self._end_watch(watched)
        return before.close if before else lambda: None

    def watch(self, on_change: Callable[[str], None]) -> None:
        """Subscribe to the provider's events, where it has them."""
        if Capability.EVENTS in self.capabilities and self._watch is None:
            self._watch = self.provider.watch(on_change)

    def prepare(self, app: App, *, seconds: float, progress: Progress) -> None:
        """Prepare an app, once for all agents that wait for it.

        :raises Cancelled: `progress` did; :raises DispatcherError: as the provider.
        """
        self.preparations.run(self.provider, app, seconds=seconds, progress=progress, caller=self.pool)

    def call(self, work: Callable[[], _T], seconds: float) -> _T:
        """Return the result of `work`, run in a thread of the pool: for callers that must not hang.

        :raises DeadlineExceeded: it took too long; it is not waited for any more.
        :raises DispatcherError: as `work`.
        """
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self.pool.submit(run)
        try:
            return future.result(seconds)
        except FutureTimeout:
            raise hung_call(self.plugin, "answer") from None

    def close(self, seconds: float) -> None:
        """Begin no more jobs, wait a little for those in progress, release the provider."""
        self.pool.close()
        self.preparations.pool.close()
        self.pool.join(seconds)
        closing = threading.Thread(target=self._release, name=f"dispatcher-{self.name}-close", daemon=True)
        closing.start()
        closing.join(seconds)

    def _release(self) -> None:
        self._end_watch(self._watch)
        if self._provider:
            self._provider.close()

    def _end_watch(self, watch: Closeable | None) -> None:
        if watch:
            with suppress(DispatcherError):
                bounded(self.plugin, "the end of its watch", watch.close)


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
        if backend is None or not backend.loaded:
            with self._lock:
                backend = self._known.get(name) or Backend(name, self.config.manager.provider_threads)
                self._known[name] = backend
            with backend.loading:
                if not backend.loaded:
                    backend.use(self._make(name, self.config))
                    backend.loaded = True
        return backend

    def load_all(self, names: Iterable[str]) -> None:
        """Make providers at the same time."""
        names = list(names)
        with self._plugins.guarded(names):
            at_once(functools.partial(self.get, name) for name in names)

    def check_overdue(self) -> None:
        """Give up calls that hang; called regularly."""
        for backend in self:
            backend.pool.check_overdue()
            backend.preparations.pool.check_overdue()

    def make(self, names: Iterable[str], config: Config) -> dict[str, Made]:
        """Make instances of providers at the same time with another configuration, for `Backend.use`."""
        made: dict[str, Made] = {}

        def one(name: str) -> None:
            made[name] = self._make(name, config)

        names = list(names)
        with self._plugins.guarded(names):
            at_once(functools.partial(one, name) for name in names)
        return made

    def _make(self, name: str, config: Config) -> Made:
        """Make a provider's instance, or note why that is impossible."""
        plugins = self._plugins
        ref = plugins.ref("provider", name)
        try:
            cls, options = plugins.provider(name), config.provider_options(name, plugins)
            ref, context = plugins.ref("provider", name), self._context(name)
            wrapped = bounded(ref, "__init__", lambda: instance(cls, context=context, options=options))
            provider = ContainedProvider(wrapped, ref)
            return Made(ref, provider, bounded(ref, "capabilities", lambda: provider.capabilities))
        except DispatcherError as error:
            return Made(ref, None, problem=error)

    def _context(self, name: str) -> ProviderContext:
        try:
            state_dir, run_dir = provider_dirs(self._paths, name)
        except OSError as error:
            raise ProviderError(f"The provider {name} has no directories", why=str(error)) from error
        return ProviderContext(
            installation=self._installation,
            state_dir=state_dir,
            run_dir=run_dir,
            proxy_gid=self._accounts.proxy_gid,
            privileged=self._accounts.agent_uids is not None,
            log=logging.getLogger(f"dispatcher.plugin.provider.{name}"),
        )


def collect_usage(wanted: Mapping[Backend, Sequence[Handle]]) -> dict[str, Usage]:
    """Return the usage of agents, by agent name, as far as the backends answer."""
    asked = {backend: handles for backend, handles in wanted.items() if Capability.USAGE in backend.capabilities}
    found: dict[str, Usage] = {}
    answered = threading.Semaphore(0)

    def query(backend: Backend, handles: Sequence[Handle]) -> None:
        try:
            usage = backend.provider.usage(handles, deadline=Deadline(USAGE_TIME))
            found.update({handle.agent: usage[handle.name] for handle in handles if handle.name in usage})
        except DispatcherError as error:
            _log.warning("The usage of the agents of %s is unknown: %s", backend.name, error)
        finally:
            answered.release()

    for backend, handles in asked.items():
        backend.pool.submit(lambda backend=backend, handles=handles: query(backend, handles))  # type: ignore[misc]
    deadline = Deadline(USAGE_TIME)
    for _ in asked:
        answered.acquire(timeout=deadline.remaining())
    return dict(found)
