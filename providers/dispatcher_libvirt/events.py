"""libvirt's lifecycle events for the manager: one connection of its own, and one thread that reopens it."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

import libvirt

from dispatcher.plugin import Deadline, DispatcherError
from dispatcher_libvirt.connection import Backend, Lane, Slot

_RETRY = 1.0  # seconds between two attempts to connect
_CONNECT = 10.0
_CHECK = 5.0  # seconds between two checks of the connection, in addition to its close callback

_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


class Watch:
    """Reports the names of machines that changed; reconnects by itself, and reports "" after each gap."""

    def __init__(self, backend: Backend, prefix: str, on_change: Callable[[str], None]) -> None:
        self._backend, self._prefix, self._on_change = backend, prefix, on_change
        self._wake = threading.Event()
        self._closed = False
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._run, name="libvirt-watch", daemon=True)
        self._thread.start()
        self._connected.wait(2.0)  # so that no change after the return of `watch` is missed

    def close(self) -> None:
        """See `Closeable`."""
        self._closed = True
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _run(self) -> None:
        gap = False
        while not self._closed:
            slot = Slot()
            try:
                self._watch(slot, gap=gap)
            except DispatcherError as error:
                _log.debug("watching machines: %s", error)
                self._wake.wait(_RETRY)
            finally:
                slot.close()
            gap = True

    def _watch(self, slot: Slot, *, gap: bool) -> None:
        """Report until the connection is lost or this is closed."""
        self._wake.clear()
        if self._closed:
            return
        call = functools.partial(self._backend.call, what="watching", lane=Lane.WORK, slot=slot)
        number = call(self._register, deadline=Deadline(_CONNECT))
        self._connected.set()
        try:
            if gap:
                self._report("")
            while not self._closed and not self._wake.wait(_CHECK) and slot.alive():
                pass
        finally:
            if slot.alive():
                call(functools.partial(_deregister, number=number), deadline=Deadline(_CONNECT))

    def _register(self, connection: libvirt.virConnect) -> int:
        connection.registerCloseCallback(lambda *_: self._wake.set(), None)
        kind = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        return int(connection.domainEventRegisterAny(None, kind, self._event, None))

    def _event(self, _: libvirt.virConnect, domain: libvirt.virDomain, *__: object) -> None:
        name = domain.name()
        if name.startswith(self._prefix):
            self._report(name)

    def _report(self, name: str) -> None:
        if self._closed:
            return
        try:
            self._on_change(name)
        except Exception:
            _log.exception("a watcher of machines failed")


def _deregister(connection: libvirt.virConnect, number: int) -> None:
    connection.unregisterCloseCallback()
    connection.domainEventDeregisterAny(number)
