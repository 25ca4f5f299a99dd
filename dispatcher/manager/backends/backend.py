"""The providers of this installation, each with its threads.  Loads plugins; calls them through `Guard`.

A provider that cannot be loaded is a backend that is unusable, with the reason; its agents stay known.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from dispatcher.config.host_users import HostAccounts
from dispatcher.config.layout import Paths
from dispatcher.config.load import Config
from dispatcher.config.plugins import Plugins
from dispatcher.manager.backends.contained import Guard
from dispatcher.manager.backends.pool import Pool
from dispatcher.manager.files.agent_dirs import provider_dirs
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Cancelled, DeadlineExceeded, DispatcherError, PluginError
from dispatcher.plugin.model import App, Capability
from dispatcher.plugin.provider import Closeable, Progress, ProviderContext

PREPARING_AT_ONCE = 4  # image pulls and the like
FRESH = 2.0  # seconds for which an app that was prepared counts as prepared

_T = TypeVar("_T")
_log = logging.getLogger("dispatcher.manager")


class Preparation:
    """One `prepare` of one app, shared by all agents that wait for it.

    :ivar until: it counts as done until then; None while it goes on.
    """

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: DispatcherError | None = None
        self.stage: tuple[str, str, float | None] = ("preparing", "", None)
        self.waiting = 0
        self.until: Deadline | None = None


class Backend:
    """One provider: its instance, its pools, and whether it answers.

    :ivar guard: the contained provider; :ivar reachable: it answered when it was last asked; :ivar since: when
        that began; :ivar contact: when it last answered; :ivar problem: why it is not reachable.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.pool = Pool(f"dispatcher-{name}", threads)
        self._preparing_pool = Pool(f"dispatcher-{name}-prepare", PREPARING_AT_ONCE)
        self._guard: Guard | None = None
        self._watch: Closeable | None = None
        self._preparations: dict[str, Preparation] = {}
        self._lock = threading.Lock()
        self.capabilities: frozenset[Capability] = frozenset()
        self.origin = ""
        self.reachable = False
        self.since: float | None = None
        self.contact: float | None = None
        self.problem: DispatcherError = PluginError(f"The provider {name} has not been asked yet")
        self.listing = 0  # 1: its agents are being listed, 2: they shall be listed once more
        self.answered = False  # since this manager began
        self.losses = 0  # how often in a row it did not answer
        self.asking = False  # it is asked again soon

    @property
    def guard(self) -> Guard:
        """The contained provider.

        :raises DispatcherError: it could not be loaded.
        """
        if self._guard is None:
            raise self.problem
        return self._guard

    @property
    def usable(self) -> bool:
        """Whether the plugin was loaded."""
        return self._guard is not None

    def load(self, config: Config, plugins: Plugins, context: ProviderContext) -> Callable[[], None]:
        """Make the provider's instance, or note why that is impossible; return what closes an earlier one."""
        before, watched = self._guard, self._watch
        try:
            cls = plugins.provider(self.name)
            options = config.provider_options(self.name, plugins)
            guard = Guard(cls(context=context, options=options))
        except DispatcherError as error:
            self.problem = error
        except Exception as error:
            _log.exception("The provider %s cannot be made", self.name)
            self.problem = PluginError(
                f"The provider {self.name} cannot be made", why=f"{type(error).__name__}: {error}"
            )
        else:
            self._guard, self._watch = guard, None
            self.capabilities = guard.capabilities
            self.origin = plugins.available().get(self.name, "this program")
            if watched:
                _close(watched)
            if before:
                return before.close
        return lambda: None

    def watch(self, on_change: Callable[[str], None]) -> None:
        """Begin to listen to the provider's events, where it has them."""
        if Capability.EVENTS in self.capabilities and self._watch is None:
            self._watch = self.guard.watch(on_change)

    def prepare(self, app: App, *, seconds: float, progress: Progress) -> None:
        """Prepare an app, once for all who wait; their threads' places are free meanwhile.

        :raises Cancelled: `progress` did; the work goes on while others wait for it.
        :raises DispatcherError: as the provider.
        """
        work = self._join(app, seconds)
        try:
            if not work.done.is_set():
                with self.pool.released():
                    while not work.done.wait(0.25):
                        progress(*work.stage)
        finally:
            with self._lock:
                work.waiting -= 1
        if work.error:
            raise work.error

    def _join(self, app: App, seconds: float) -> Preparation:
        key = app.fingerprint_text
        with self._lock:
            work = self._preparations.get(key)
            if work is None or (work.until is not None and work.until.expired):
                work = self._preparations[key] = mine = Preparation()
                self._preparing_pool.submit(
                    lambda: self._prepare(app, key, mine, seconds),
                    overdue=lambda job: self._overdue(mine, job.call),
                )
            work.waiting += 1
        return work

    def _prepare(self, app: App, key: str, work: Preparation, seconds: float) -> None:
        def progress(step: str, detail: str = "", fraction: float | None = None) -> None:
            work.stage = (step, detail, fraction)
            with self._lock:
                if work.waiting:
                    return
                self._forget(key, work)
            raise Cancelled("Nobody waits for it any more")

        try:
            self.guard.prepare(app, deadline=Deadline(seconds), progress=progress)
        except DispatcherError as error:
            with self._lock:
                self._forget(key, work)
            work.error = error
        work.until = Deadline(FRESH)
        work.done.set()

    def _forget(self, key: str, work: Preparation) -> None:
        if self._preparations.get(key) is work:
            del self._preparations[key]

    def _overdue(self, work: Preparation, call: str) -> None:
        """Tell those who wait.  The work stays known until its call returns: nobody makes it hang twice."""
        work.error = hanging(self.name, call)
        work.done.set()

    def ask(self, call: Callable[[], _T], seconds: float) -> _T:
        """Return what a call returns that is made in a thread of the pool: for callers that must not hang.

        :raises DeadlineExceeded: it took too long; it is left to itself.
        :raises DispatcherError: as the call.
        """
        done = threading.Event()
        results: list[_T] = []
        errors: list[DispatcherError] = []

        def run() -> None:
            try:
                results.append(call())
            except DispatcherError as error:
                errors.append(error)
            finally:
                done.set()

        self.pool.submit(run)
        done.wait(seconds)
        if errors:
            raise errors[0]
        if not results:
            raise hanging(self.name, "answer")
        return results[0]

    def tend(self) -> None:
        """Look after calls that hang; called regularly."""
        self.pool.watch()
        self._preparing_pool.watch()

    def close(self, seconds: float) -> None:
        """Begin nothing more, wait a little for what runs, release the provider."""
        self.pool.close()
        self._preparing_pool.close()
        self.pool.join(seconds)
        closing = threading.Thread(target=self._release, name=f"dispatcher-{self.name}-close", daemon=True)
        closing.start()
        closing.join(seconds)

    def _release(self) -> None:
        if self._watch:
            _close(self._watch)
        if self._guard:
            self._guard.close()


class Backends:
    """All backends by name."""

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
        """Return a backend, loaded at the first use; it may be unusable."""
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
        """Make a provider's instance again, with the configuration of now; return what closes the old one."""
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


def hanging(provider: str, call: str) -> DispatcherError:
    """Return the error for a call that did not come back."""
    return DeadlineExceeded(
        f"The provider {provider} does not come back",
        why=f"its call {call} hangs past its deadline",
        fix="look at the backend; the manager goes on without it and asks again when the call returns",
    )


def _close(closeable: Closeable) -> None:
    try:
        closeable.close()
    except Exception:
        _log.exception("A provider's watch cannot be closed")
