"""A simulated container engine: agents in memory, errors of its own, and faults on demand.

Like a real backend, it outlives provider instances and has labels, events and outages.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.model import Capability
from dispatcher.plugin.provider import Progress
from tests.support.fake_app import FakeApp

ALL = frozenset(Capability) - {Capability.OWN_DATA}
_UNSET: Any = object()


class EngineError(Exception):
    """An error of the simulated SDK; must not escape from a provider."""


class EngineDown(EngineError):
    """The connection fails."""


class EngineTimeout(EngineError):
    """No answer in time."""


class NoSuchThing(EngineError):
    """Unknown container or image."""


@dataclass
class Fault:
    """One fault to inject; see `FakeBackend.inject`."""

    method: str
    agent: str | None
    delay: float
    hang: bool
    error: BaseException | type[BaseException] | None
    result: Any
    times: int | None
    after: bool


@dataclass
class Container:
    """One agent on the backend, with the labels that a provider gave it."""

    name: str
    labels: dict[str, str]
    app: FakeApp
    started_at: float
    state: str = "running"  # running, paused, saved, exited
    exit_reason: str = ""
    oom_kills: int = 0
    listeners: tuple[str, ...] = ()
    log: deque[bytes] = field(default_factory=lambda: deque(maxlen=10_000))


class FakeBackend:
    """The backend that `FakeProvider` speaks to; `FakeBackend.named(NAME)` gives the same one every time.

    :ivar capabilities: what the provider declares; set it before use.
    :ivar calls: every contract method that was called, with the agent's name or "".
    :ivar down: whether connections fail; :ivar silent: whether calls get no answer.
    """

    _all: ClassVar[dict[str, FakeBackend]] = {}

    def __init__(self) -> None:
        self.capabilities: frozenset[Capability] = ALL
        self.containers: dict[str, Container] = {}
        self.volumes: dict[str, Path] = {}
        self.calls: list[tuple[str, str]] = []
        self.down = False
        self.silent = False
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._released = threading.Event()
        self._watchers: dict[object, Callable[[str], None]] = {}

    @classmethod
    def named(cls, name: str) -> FakeBackend:
        """Return the backend of that name, made on first use."""
        return cls._all.setdefault(name, cls())

    # -- for tests ---------------------------------------------------------------------------------------

    def inject(
        self,
        method: str,
        *,
        agent: str | None = None,
        delay: float = 0.0,
        hang: bool = False,
        error: BaseException | type[BaseException] | None = None,
        result: Any = _UNSET,
        times: int | None = 1,
        after: bool = False,
    ) -> None:
        """Make the next `times` calls (None: all) of a contract method go wrong.

        :param agent: only for this agent; :param delay: seconds to wait first, telling progress;
        :param hang: wait until `release`, beyond any deadline; :param error: raise it as it is;
        :param result: return this nonsense in the end; :param after: only once the method has done its work.
        """
        with self.lock:
            after = after or result is not _UNSET
            self._faults.append(Fault(method, agent, delay, hang, error, result, times, after))

    def release(self) -> None:
        """End every call that hangs, and remove all faults."""
        with self.lock:
            self._faults.clear()
        self._released.set()
        self._released = threading.Event()

    @contextlib.contextmanager
    def outage(self, how: str) -> Iterator[None]:
        """Return a context in which the backend is down or silent."""
        setattr(self, how, True)
        try:
            yield
        finally:
            setattr(self, how, False)
            self.notify("")

    def kill(self, name: str, reason: str = "killed by signal 9") -> None:
        """End an agent (by backend name) as if it had died."""
        self.containers[name].app.end(reason)

    def close(self) -> None:
        """End every agent."""
        with self.lock:
            for container in self.containers.values():
                container.app.end()
            self.containers.clear()

    # -- for the provider --------------------------------------------------------------------------------

    def fault(
        self,
        method: str,
        agent: str,
        deadline: Deadline,
        progress: Progress,
        result: Any = None,
        *,
        after: bool = False,
    ) -> Any:
        """Carry out the first fault that fits; return its result, by default `result`."""
        with self.lock:
            if not after:
                self.calls.append((method, agent))
            for chosen in self._faults:
                if chosen.method == method and chosen.agent in {None, agent} and chosen.after is after:
                    break
            else:
                return result
            if chosen.times is not None:
                chosen.times -= 1
                if chosen.times <= 0:
                    self._faults.remove(chosen)
        if chosen.hang:
            self._released.wait()
        end = time.monotonic() + chosen.delay
        while (left := end - time.monotonic()) > 0:
            if deadline.expired:
                raise EngineTimeout(method)
            progress("waiting", "an injected delay")
            time.sleep(min(0.05, left, max(0.001, deadline.remaining())))
        if chosen.error is not None:
            raise chosen.error
        return result if chosen.result is _UNSET else chosen.result

    def round_trip(self, deadline: Deadline) -> None:
        """Simulate one round trip."""
        if self.down:
            raise EngineDown("connection refused")
        if self.silent:
            while self.silent and not deadline.expired:
                time.sleep(min(0.02, max(0.001, deadline.remaining())))
            raise EngineTimeout("no answer")
        if deadline.expired:
            raise EngineTimeout("no time left")

    def get(self, name: str) -> Container:
        """Return a container."""
        with self.lock:
            if name not in self.containers:
                raise NoSuchThing(name)
            return self.containers[name]

    def died(self, name: str, reason: str) -> None:
        """Note that an app ended by itself."""
        with self.lock:
            container = self.containers.get(name)
            if container:
                container.state, container.exit_reason = "exited", reason
        self.notify(name)

    def watch(self, on_change: Callable[[str], None]) -> contextlib.ExitStack:
        """Report changes until what is returned is closed."""
        watch = contextlib.ExitStack()
        with self.lock:
            self._watchers[watch] = on_change
        watch.callback(self._watchers.pop, watch)
        return watch

    def notify(self, name: str) -> None:
        """Call all watchers."""
        with self.lock:
            watchers = list(self._watchers.values())
        for watcher in watchers:
            watcher(name)
