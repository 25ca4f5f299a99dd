"""Connections to one libvirtd, and calls with deadlines.

Queries (observe, list, usage) and work (start, save, destroy) use separate connections, because libvirtd serves
only a few requests of one connection at a time: a save that takes a minute delays no query.  The next call
reopens a lost connection.
"""

from __future__ import annotations

import enum
import functools
import itertools
import logging
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import libvirt

from dispatcher.plugin import Deadline, Unavailable
from dispatcher_libvirt import errors

_T = TypeVar("_T")
Tick = Callable[[], None]

MAX_CALLS = 64  # in progress at the same time; more than that means that libvirtd has stopped answering
_MAX_LOST_KEEPALIVES = 3  # unanswered messages after which a connection is closed
_TICK = 0.4  # seconds between two calls of `tick`

_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


class Lane(enum.Enum):
    """The kind of a call."""

    QUERY = "query"  # quick, and safe to repeat
    WORK = "work"  # may take long, is not repeated


def _in_thread(function: Callable[[], _T], ended: Callable[[], None] = lambda: None) -> Future[_T]:
    """Call a function in a daemon thread of its own: a call to libvirt cannot be cancelled, only abandoned."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            # Release the call's locals (a connection, for example) here, not when the error is discarded.
            traceback.clear_frames(error.__traceback__)
            ended()
            future.set_exception(error)
        else:
            ended()
            future.set_result(result)

    threading.Thread(target=run, name="libvirt-call", daemon=True).start()
    return future


_event_loop_lock = threading.Lock()
_event_loop_runs = False


def _start_event_loop() -> None:
    """Run libvirt's default event loop in a thread, once per process and before its first connection.

    Without it connections send no keep-alive messages and report no events.
    """
    global _event_loop_runs
    with _event_loop_lock:
        if _event_loop_runs:
            return
        # The binding prints every error to stderr unless a handler is registered.
        libvirt.registerErrorHandler(lambda *_: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True).start()
        _event_loop_runs = True


def _run_event_loop() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as error:  # a failing callback must not stop the loop
            _log.warning("libvirt's event loop: %s", error)


class Link:
    """One connection, closed when it is retired and no call uses it any more.

    libvirt frees a connection while another thread still calls it, and closing one waits for an answer.  So only
    the threads of calls ever hold the connection itself.
    """

    def __init__(self, connection: libvirt.virConnect) -> None:
        self._connection: libvirt.virConnect | None = connection
        self._lock = threading.Lock()
        self._users = 0
        self._retired = False

    def alive(self) -> bool:
        """Whether it is usable, as far as this side knows."""
        with self._lock:
            if self._connection is None or self._retired:
                return False
            try:
                return bool(self._connection.isAlive())
            except libvirt.libvirtError:
                return False

    def use(self, function: Callable[[libvirt.virConnect], _T]) -> _T:
        """Return the result of `function`, called with the connection; only in a thread of a call.

        :raises libvirtError: from `function`, or the connection is closed.
        """
        with self._lock:
            connection = self._connection
            if connection is None or self._retired:
                raise libvirt.libvirtError("the connection was closed")
            self._users += 1
        try:
            return function(connection)
        finally:
            del connection
            with self._lock:
                self._users -= 1
            self._close_if_unused()

    def retire(self) -> None:
        """Close it as soon as no call uses it; does not wait."""
        with self._lock:
            self._retired = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        with self._lock:
            if not self._retired or self._users or self._connection is None:
                return
            box, self._connection = [self._connection], None
        _in_thread(functools.partial(_close, box))


class Slot:
    """The place of one link, opened on first use."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self.opening = threading.Lock()

    def alive(self) -> Link | None:
        """Return the link if it is usable."""
        link = self.link
        return link if link is not None and link.alive() else None

    def drop(self, link: Link) -> None:
        """Retire a link that failed."""
        link.retire()
        if self.link is link:
            self.link = None

    def close(self) -> None:
        """Retire the link, if there is one."""
        if self.link is not None:
            self.drop(self.link)


class Backend:
    """The libvirtd at one URI.

    :param keepalive: seconds between two keep-alive messages; three unanswered ones close a connection.
    """

    def __init__(self, uri: str, *, connections: int, keepalive: float) -> None:
        self.uri = uri
        self._keepalive = max(1, round(keepalive))
        self._calls = threading.BoundedSemaphore(MAX_CALLS)
        self._query = Slot()
        self._work = [Slot() for _ in range(connections)]
        self._turn = itertools.count()

    def call(
        self,
        function: Callable[[libvirt.virConnect], _T],
        *,
        what: str,
        deadline: Deadline,
        lane: Lane = Lane.QUERY,
        slot: Slot | None = None,
        tick: Tick | None = None,
    ) -> _T:
        """Return the result of `function`, called in another thread with a usable connection.

        :param what: the action, for error messages ("starting alice's machine").
        :param slot: a connection of the caller's own, in place of one of the lane's.
        :param tick: called about twice a second meanwhile; an exception from it ends the waiting, not the call.
        :raises DispatcherError: libvirt's error, translated; libvirtError never escapes.
        :raises DeadlineExceeded: no answer before the deadline.
        """
        if slot is None:
            slot = self._query if lane is Lane.QUERY else self._work[next(self._turn) % len(self._work)]
        for attempt in itertools.count():
            link = slot.alive() or self._open(slot, what, deadline, tick)
            try:
                return self._wait(self._submit(functools.partial(link.use, function)), what, deadline, tick)
            except libvirt.libvirtError as error:
                if errors.connection_lost(error) or not link.alive():
                    slot.drop(link)
                    if lane is Lane.QUERY and attempt == 0:
                        continue
                raise errors.translate(error, self.uri, what) from error
        raise AssertionError("unreachable")  # pragma: no cover

    def close(self) -> None:
        """Close all connections; calls in progress end by themselves."""
        for slot in (self._query, *self._work):
            slot.close()

    def _open(self, slot: Slot, what: str, deadline: Deadline, tick: Tick | None) -> Link:
        """Open a slot's link; one thread at a time tries, the others wait for it."""
        _start_event_loop()
        while not slot.opening.acquire(timeout=min(_TICK, deadline.remaining())):
            if deadline.expired:
                raise errors.timed_out(self.uri, what)
            if tick:
                tick()
        if (link := slot.alive()) is not None:
            slot.opening.release()
            return link

        def opened() -> Link:
            try:
                connection = libvirt.open(self.uri)
                try:
                    connection.setKeepAlive(self._keepalive, _MAX_LOST_KEEPALIVES)
                except libvirt.libvirtError as error:
                    _log.debug("no keep-alive on %s: %s", self.uri, error)
                slot.link = Link(connection)
                return slot.link
            finally:
                slot.opening.release()

        try:
            call = self._submit(opened)
        except Unavailable:
            slot.opening.release()
            raise
        try:
            return self._wait(call, what, deadline, tick)
        except libvirt.libvirtError as error:
            if errors.authentication_failed(error):
                raise errors.translate(error, self.uri, what) from error
            raise errors.unreachable(self.uri, errors.message(error)) from error

    def _submit(self, function: Callable[[], _T]) -> Future[_T]:
        if not self._calls.acquire(blocking=False):
            raise errors.unreachable(self.uri, f"{MAX_CALLS} calls are waiting for an answer")
        return _in_thread(function, self._calls.release)

    def _wait(self, call: Future[_T], what: str, deadline: Deadline, tick: Tick | None) -> _T:
        while not wait([call], min(_TICK, deadline.remaining())).done:
            if deadline.expired:
                raise errors.timed_out(self.uri, what)
            if tick:
                tick()
        return call.result()


def _close(box: list[libvirt.virConnect]) -> None:
    try:
        box.pop().close()
    except libvirt.libvirtError as error:
        _log.debug("closing a connection: %s", error)
