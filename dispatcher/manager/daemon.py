"""The manager's process: signals, systemd, the exit.  `build` makes a manager that a test can start by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from dispatcher import logs
from dispatcher.config import Config
from dispatcher.errors import DispatcherError
from dispatcher.manager.service import Manager
from dispatcher.plugins import Plugins

_log = logs.logger("manager")


def build(config: Config, path: Path | None = None, plugins: Plugins | None = None) -> Manager:
    """Return a manager that is not started yet."""
    return Manager(config, path, plugins)


def run(config: Config, path: Path | None = None) -> int:
    """Run the manager in the foreground until SIGTERM or SIGINT; SIGHUP reads the configuration again.

    :param path: of the configuration file; None looks for it as at the start.
    :return: the exit code.
    :raises DispatcherError: it cannot start, and why.
    """
    logs.configure(config.manager.log_level, config.manager.log_format)
    notify = _notifier()
    manager = build(config, path)
    ended, reload, look = threading.Event(), threading.Event(), threading.Event()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        (reload if number == signal.SIGHUP else ended).set()
        look.set()

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    try:
        manager.start()
        notify("READY=1")
        while not ended.is_set():
            look.wait()
            look.clear()
            if reload.is_set() and not ended.is_set():
                reload.clear()
                _reload_loudly(manager)
        _log.info("ending; agents go on")
        notify("STOPPING=1")
    finally:
        manager.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _reload_loudly(manager: Manager) -> None:
    try:
        manager.reload()
    except DispatcherError as error:
        _log.error("the configuration is not used", what=error.what, why=error.why, fix=error.fix)


def _notifier() -> Callable[[str], None]:
    """Return how to tell systemd (sd_notify(3)); agents must not inherit the way."""
    address = os.environ.pop("NOTIFY_SOCKET", "")

    def notify(message: str) -> None:
        if address:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.connect("\0" + address[1:] if address.startswith("@") else address)
                sock.sendall(message.encode())

    return notify
