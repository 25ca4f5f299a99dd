"""Preparing apps (image pulls and the like): one `prepare` per app, shared by all agents that wait for it.

Each agent's operation gets the progress (`agents.operations.task`).  How it reaches a user's waiting page:
docs/explanation/lifecycle.md.
"""

from __future__ import annotations

import threading

from dispatcher.manager.backends.contained_provider import ContainedProvider
from dispatcher.manager.backends.pool import Pool
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Cancelled, DispatcherError
from dispatcher.plugin.model import App
from dispatcher.plugin.provider import Progress

CONCURRENT = 4  # preparations at the same time, per provider
VALID = 2.0  # seconds for which a prepared app counts as prepared
_POLL = 0.25  # seconds between two looks at whether the wait was cancelled


class _Preparation:
    """One call of `prepare`.

    :ivar until: the result is valid until then; None while the call is in progress.
    """

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: DispatcherError | None = None
        self.stage: tuple[str, str, float | None] = ("preparing", "", None)
        self.waiting = 0
        self.until: Deadline | None = None


class Preparations:
    """The preparations of one provider, in threads of their own: a pull must not keep agents from stopping.

    :ivar pool: of these threads.
    """

    def __init__(self, provider: str) -> None:
        self.pool = Pool(f"dispatcher-{provider}-prepare", CONCURRENT)
        self._known: dict[str, _Preparation] = {}
        self._lock = threading.Lock()

    def run(
        self, provider: ContainedProvider, app: App, *, seconds: float, progress: Progress, caller: Pool
    ) -> None:
        """Prepare an app, or wait for the preparation in progress; the caller's pool gets its place back
        meanwhile.

        :raises Cancelled: `progress` did; the call goes on while others wait for it.
        :raises DispatcherError: as the provider.
        """
        work = self._join(provider, app, seconds)
        try:
            if not work.done.is_set():
                with caller.released():
                    while not work.done.wait(_POLL):
                        progress(*work.stage)
        finally:
            with self._lock:
                work.waiting -= 1
        if work.error:
            raise work.error

    def _join(self, provider: ContainedProvider, app: App, seconds: float) -> _Preparation:
        key = app.fingerprint_text
        with self._lock:
            work = self._known.get(key)
            if work is None or (work.until is not None and work.until.expired):
                work = self._known[key] = mine = _Preparation()
                self.pool.submit(
                    lambda: self._prepare(provider, app, key, mine, seconds),
                    overdue=lambda error: self._overdue(mine, error),
                )
            work.waiting += 1
        return work

    def _prepare(
        self, provider: ContainedProvider, app: App, key: str, work: _Preparation, seconds: float
    ) -> None:
        def progress(step: str, detail: str = "", fraction: float | None = None) -> None:
            work.stage = (step, detail, fraction)
            with self._lock:
                if work.waiting:
                    return
                self._drop(key, work)
            raise Cancelled("No agent waits for the preparation any more")

        try:
            provider.prepare(app, deadline=Deadline(seconds), progress=progress)
        except DispatcherError as error:
            with self._lock:
                self._drop(key, work)
            work.error = error
        work.until = Deadline(VALID)
        work.done.set()

    def _drop(self, key: str, work: _Preparation) -> None:
        if self._known.get(key) is work:
            del self._known[key]

    def _overdue(self, work: _Preparation, error: DispatcherError) -> None:
        """Fail the waiting agents.  The preparation stays known until its call returns: it is not called twice."""
        work.error = error
        work.done.set()
