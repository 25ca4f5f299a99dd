"""libvirt's event loop in a thread of its own, one per process.  Touches libvirt's global state.

libvirt takes one implementation per process, and only before the first connection is made; with it connections
send keep-alive messages and report events.  The thread lives as long as the process.
"""

from __future__ import annotations

import logging
import threading

import libvirt

_lock = threading.Lock()
_started = False
_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


def start() -> None:
    """Run the loop, once per process.  Must come before the process' first connection."""
    global _started
    with _lock:
        if _started:
            return
        # libvirt's Python binding prints every error to stderr unless told otherwise.
        libvirt.registerErrorHandler(_ignore, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run, name="libvirt-events", daemon=True).start()
        _started = True


def _run() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as error:  # a callback's fault must not end the events of all
            _log.warning("libvirt's event loop: %s", error)


def _ignore(context: object, error: object) -> None:
    """Errors come as exceptions; nothing is printed."""
