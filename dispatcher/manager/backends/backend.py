"""One provider: its instance, its threads, and whether its backend answers.

A provider that cannot be loaded is an unusable backend, with the reason; its agents stay known.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from dispatcher.config.load import Config
from dispatcher.config.plugins import Plugins
from dispatcher.manager.backends.contained import ContainedProvider
from dispatcher.manager.backends.pool import Pool, hung_call
from dispatcher.manager.backends.preparation import Preparations
from dispatcher.manager.backends.single_flight import SingleFlight
from dispatcher.plugin.errors import DispatcherError, PluginError
from dispatcher.plugin.model import App, Capability
from dispatcher.plugin.provider import Closeable, Progress, ProviderContext

_T = TypeVar("_T")
_log = logging.getLogger("dispatcher.manager")


class Contact(enum.Enum):
    """Whether a backend answers, and whether it has since this manager began."""

    NOT_CALLED = enum.auto()
    NEVER_ANSWERED = enum.auto()
    ANSWERS = enum.auto()
    LOST = enum.auto()


class Backend:
    """One provider.

    :ivar contact: whether it answers; :ivar since: when that began; :ivar last_contact: when it last answered;
        :ivar problem: why it does not.
    :ivar listing: the list of its agents; :ivar losses: lists in a row that failed; :ivar retry: a further one
        is scheduled.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.pool = Pool(f"dispatcher-{name}", threads)
        self._preparations = Preparations(name)
        self._provider: ContainedProvider | None = None
        self._watch: Closeable | None = None
        self.capabilities: frozenset[Capability] = frozenset()
        self.origin = ""
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

    def load(self, config: Config, plugins: Plugins, context: ProviderContext) -> Callable[[], None]:
        """Make the provider's instance, or note why that is impossible; return what closes an earlier one."""
        before, watched = self._provider, self._watch
        try:
            cls = plugins.provider(self.name)
            options = config.provider_options(self.name, plugins)
            provider = ContainedProvider(cls(context=context, options=options))
        except DispatcherError as error:
            self.problem = error
        except Exception as error:
            _log.exception("The provider %s cannot be created", self.name)
            self.problem = PluginError(
                f"The provider {self.name} cannot be created", why=f"{type(error).__name__}: {error}"
            )
        else:
            self._provider, self._watch = provider, None
            self.capabilities = provider.capabilities
            self.origin = plugins.available().get(self.name, "this program")
            if watched:
                _close(watched)
            if before:
                return before.close
        return lambda: None

    def watch(self, on_change: Callable[[str], None]) -> None:
        """Subscribe to the provider's events, where it has them."""
        if Capability.EVENTS in self.capabilities and self._watch is None:
            self._watch = self.provider.watch(on_change)

    def prepare(self, app: App, *, seconds: float, progress: Progress) -> None:
        """Prepare an app, once for all agents that wait for it.

        :raises Cancelled: `progress` did; :raises DispatcherError: as the provider.
        """
        self._preparations.run(self.provider, app, seconds=seconds, progress=progress, caller=self.pool)

    def call(self, work: Callable[[], _T], seconds: float) -> _T:
        """Return the result of `work`, run in a thread of the pool: for callers that must not hang.

        :raises DeadlineExceeded: it took too long; it is not waited for any more.
        :raises DispatcherError: as `work`.
        """
        done = threading.Event()
        results: list[_T] = []
        errors: list[DispatcherError] = []

        def run() -> None:
            try:
                results.append(work())
            except DispatcherError as error:
                errors.append(error)
            finally:
                done.set()

        self.pool.submit(run)
        done.wait(seconds)
        if errors:
            raise errors[0]
        if not results:
            raise hung_call(self.name, "answer")
        return results[0]

    def check_overdue(self) -> None:
        """Give up calls that hang; called regularly."""
        self.pool.check_overdue()
        self._preparations.pool.check_overdue()

    def close(self, seconds: float) -> None:
        """Begin no more jobs, wait a little for those in progress, release the provider."""
        self.pool.close()
        self._preparations.pool.close()
        self.pool.join(seconds)
        closing = threading.Thread(target=self._release, name=f"dispatcher-{self.name}-close", daemon=True)
        closing.start()
        closing.join(seconds)

    def _release(self) -> None:
        if self._watch:
            _close(self._watch)
        if self._provider:
            self._provider.close()


def _close(closeable: Closeable) -> None:
    try:
        closeable.close()
    except Exception:
        _log.exception("A provider's watch cannot be closed")
