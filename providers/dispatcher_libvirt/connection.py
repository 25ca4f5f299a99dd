"""Connections to one libvirtd, and calls with deadlines.  Touches libvirt.

Queries (observe, list, usage) and work (start, save, destroy) have connections of their own, as libvirtd answers
only a few requests of one connection at a time: a save that takes a minute holds up no question.  A connection
that was lost is made again by the next call.
"""

from __future__ import annotations

import enum
import functools
import itertools
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import libvirt

from dispatcher.plugin import Deadline, Unavailable
from dispatcher_libvirt import errors_map, event_loop
from dispatcher_libvirt.workers import Call, Workers

_T = TypeVar("_T")
Tick = Callable[[], None]

MOST_CALLS = 64  # under way at once; more than that means that libvirtd has stopped answering
LOST = 3  # unanswered keep-alive messages after which a connection is given up
_TICK = 0.4  # seconds between two calls of `tick`

_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


class Lane(enum.Enum):
    """What a call is."""

    QUERY = "query"  # quick, and safe to repeat
    WORK = "work"  # may take long, is not repeated


class Link:
    """One connection, closed when it was given up *and* no call uses it any more.

    libvirt frees a connection under the feet of a call that another thread makes on it, and closing one waits
    for an answer.  So nobody but the threads of the pool ever holds the connection itself.
    """

    def __init__(self, connection: libvirt.virConnect, workers: Workers) -> None:
        self._connection: libvirt.virConnect | None = connection
        self._workers = workers
        self._lock = threading.Lock()
        self._users = 0
        self._given_up = False

    def alive(self) -> bool:
        """Whether it is usable, as far as this side knows."""
        with self._lock:
            if self._connection is None or self._given_up:
                return False
            try:
                return bool(self._connection.isAlive())
            except libvirt.libvirtError:
                return False

    def use(self, function: Callable[[libvirt.virConnect], _T]) -> _T:
        """Return what `function` returns, called with the connection; in a thread of the pool.

        :raises libvirtError: from `function`, or it was closed.
        """
        with self._lock:
            connection = self._connection
            if connection is None or self._given_up:
                raise libvirt.libvirtError("the connection was closed")
            self._users += 1
        try:
            return function(connection)
        finally:
            del connection
            self._leave()

    def give_up(self) -> None:
        """Close it as soon as no call uses it; does not wait."""
        with self._lock:
            if self._given_up:
                return
            self._given_up = True
            idle = self._users == 0
        if idle:
            self._close()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            idle = self._given_up and self._users == 0
        if idle:
            self._close()

    def _close(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            box = [connection]
            del connection
            self._workers.submit(functools.partial(_close, box), always=True)


class Slot:
    """A place for one link, made when it is first needed."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self.opening = threading.Lock()

    def alive(self) -> Link | None:
        """Return the link if it is usable."""
        link = self.link
        return link if link is not None and link.alive() else None

    def drop(self, link: Link) -> None:
        """Forget a link that failed."""
        link.give_up()
        if self.link is link:
            self.link = None


class Backend:
    """The libvirtd behind one URI.

    :param keepalive: seconds between two keep-alive messages; three unanswered ones end a connection.
    """

    def __init__(self, uri: str, *, connections: int, keepalive: float) -> None:
        self.uri = uri
        self._keepalive = max(1, round(keepalive))
        self._workers = Workers(MOST_CALLS)
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
        tick: Tick | None = None,
    ) -> _T:
        """Return what `function` returns, called in another thread with a usable connection.

        :param what: what is being done, for error messages ("starting alice's machine").
        :param tick: called about twice a second meanwhile; what it raises ends the waiting, not the call.
        :raises DispatcherError: libvirt's error, translated; libvirtError never comes out.
        :raises DeadlineExceeded: no answer before the deadline.
        """
        slot = self._query if lane is Lane.QUERY else self._work[next(self._turn) % len(self._work)]
        for attempt in itertools.count():
            link = slot.alive() or self._open(slot, what, deadline, tick)
            try:
                return self._wait(self._submit(functools.partial(link.use, function)), what, deadline, tick)
            except libvirt.libvirtError as error:
                if errors_map.lost(error) or not link.alive():
                    slot.drop(link)
                    if lane is Lane.QUERY and attempt == 0:
                        continue
                raise errors_map.translate(error, self.uri, what) from error
        raise AssertionError("unreachable")  # pragma: no cover

    def connect(self, deadline: Deadline) -> Link:
        """Return a new link that belongs to the caller (for events).

        :raises Unavailable: libvirtd does not answer.
        """
        return self._open(Slot(), "connecting", deadline, None)

    def run(self, link: Link, function: Callable[[libvirt.virConnect], _T], deadline: Deadline) -> _T:
        """Return what `function` returns, called with a link of `connect`.

        :raises DispatcherError: libvirt's error, translated, or no answer in time.
        """
        try:
            return self._wait(self._submit(functools.partial(link.use, function)), "watching", deadline, None)
        except libvirt.libvirtError as error:
            raise errors_map.translate(error, self.uri, "watching") from error

    def close(self) -> None:
        """Close all connections; calls under way end by themselves."""
        for slot in (self._query, *self._work):
            link, slot.link = slot.link, None
            if link is not None:
                link.give_up()
        self._workers.close()

    def _open(self, slot: Slot, what: str, deadline: Deadline, tick: Tick | None) -> Link:
        """Make a slot's link.  One thread at a time tries, the others wait for it."""
        event_loop.start()
        while not slot.opening.acquire(timeout=min(_TICK, deadline.remaining())):
            if deadline.expired:
                raise errors_map.too_slow(self.uri, what)
            if tick:
                tick()
        if (known := slot.alive()) is not None:
            slot.opening.release()
            return known

        def opened() -> Link:
            try:
                connection = libvirt.open(self.uri)
                try:
                    connection.setKeepAlive(self._keepalive, LOST)
                except libvirt.libvirtError as error:
                    _log.debug("no keep-alive on %s: %s", self.uri, error)
                slot.link = Link(connection, self._workers)
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
            if error.get_error_code() in {libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_CANCELLED}:
                raise errors_map.translate(error, self.uri, what) from error
            raise errors_map.unreachable(self.uri, errors_map.message(error)) from error

    def _submit(self, function: Callable[[], _T]) -> Call[_T]:
        call = self._workers.submit(function)
        if call is None:
            raise errors_map.unreachable(self.uri, f"{MOST_CALLS} calls wait for an answer already")
        return call

    def _wait(self, call: Call[_T], what: str, deadline: Deadline, tick: Tick | None) -> _T:
        while not call.wait(min(_TICK, deadline.remaining())):
            if deadline.expired:
                raise errors_map.too_slow(self.uri, what)
            if tick:
                tick()
        return call.result()


def _close(box: list[libvirt.virConnect]) -> None:
    try:
        box.pop().close()
    except libvirt.libvirtError as error:
        _log.debug("closing a connection: %s", error)
