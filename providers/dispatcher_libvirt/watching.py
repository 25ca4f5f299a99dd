"""libvirt's events for the supervisor.  Touches a connection of its own, and one thread that keeps it up."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

import libvirt

from dispatcher.plugin import Deadline, DispatcherError
from dispatcher_libvirt.connection import Backend, Link

_RETRY = 1.0  # seconds between two tries to connect
_CONNECT = 10.0
_LOOK = 5.0  # seconds between two looks at the connection, besides its own word that it was closed

_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


class Watch:
    """Reports the names of machines that changed; connects again by itself, and reports "" after each gap."""

    def __init__(self, backend: Backend, prefix: str, on_change: Callable[[str], None]) -> None:
        self._backend, self._prefix, self._on_change = backend, prefix, on_change
        self._wake = threading.Event()
        self._closed = False
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._run, name="libvirt-watch", daemon=True)
        self._thread.start()
        self._connected.wait(2.0)  # what happens after `watch` returned is not missed

    def close(self) -> None:
        """See `Closeable`."""
        self._closed = True
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _run(self) -> None:
        gap = False
        while not self._closed:
            try:
                link = self._backend.connect(Deadline(_CONNECT))
            except DispatcherError as error:
                _log.debug("watching machines: %s", error)
                gap = True
                self._wake.wait(_RETRY)
                continue
            try:
                self._watch(link, gap=gap)
            except DispatcherError as error:
                _log.debug("watching machines: %s", error)
                self._wake.wait(_RETRY)
            finally:
                link.give_up()
            gap = True

    def _watch(self, link: Link, *, gap: bool) -> None:
        """Report until the connection is gone or this is closed."""
        self._wake.clear()
        if self._closed:
            return
        number = self._backend.run(link, self._register, Deadline(_CONNECT))
        self._connected.set()
        try:
            if gap:
                self._tell("")
            while not self._closed and not self._wake.wait(_LOOK) and link.alive():
                pass
        finally:
            if link.alive():
                self._backend.run(link, functools.partial(_deregister, number=number), Deadline(_CONNECT))

    def _register(self, connection: libvirt.virConnect) -> int:
        connection.registerCloseCallback(self._lost, None)
        kind = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        return int(connection.domainEventRegisterAny(None, kind, self._event, None))

    def _event(
        self, connection: libvirt.virConnect, domain: libvirt.virDomain, event: int, detail: int, opaque: object
    ) -> None:
        name = domain.name()
        if name.startswith(self._prefix):
            self._tell(name)

    def _lost(self, connection: libvirt.virConnect, reason: int, opaque: object) -> None:
        self._wake.set()

    def _tell(self, name: str) -> None:
        if self._closed:
            return
        try:
            self._on_change(name)
        except Exception:
            _log.exception("a watcher of machines failed")


def _deregister(connection: libvirt.virConnect, number: int) -> None:
    connection.unregisterCloseCallback()
    connection.domainEventDeregisterAny(number)
