"""The manager's process: signals, systemd, the exit.  `build` makes a manager that a test can start by itself."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from dispatcher.common import log, systemd
from dispatcher.config.load import Config
from dispatcher.config.plugins import Plugins
from dispatcher.manager.app import Manager
from dispatcher.plugin.errors import DispatcherError

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_log = log.logger("manager")


def build(config: Config, path: Path | None = None, plugins: Plugins | None = None) -> Manager:
    """Return a manager that is not started yet."""
    return Manager(config, path, plugins)


def run(config: Config, path: Path | None = None) -> int:
    """Run the manager in the foreground until SIGTERM or SIGINT; SIGHUP reads the configuration again.

    :param path: of the configuration file; None looks for it as at the start.
    :return: the exit code.
    :raises DispatcherError: it cannot start, and why.
    """
    log.configure(config.manager.log_level, config.manager.log_format)
    # Taken out of the environment: agents must not inherit it.
    notify = functools.partial(systemd.notify, address=os.environ.pop(systemd.VARIABLE, ""))
    manager = build(config, path)
    with _signals() as arrived:
        try:
            manager.start()
            notify("READY=1")
            for number in arrived:
                if number != signal.SIGHUP:
                    break
                _reload_loudly(manager)
            _log.info("ending; agents go on")
            notify("STOPPING=1")
        finally:
            manager.close()
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[Iterator[int]]:
    """Yield the signals that arrive, as they do.

    Through a pipe: the kernel may hand a signal to any thread, and a main thread that waits for a lock would not
    be woken by it.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in WATCHED}
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield (number for _ in itertools.count() for number in os.read(reader, 64) if number in WATCHED)
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _reload_loudly(manager: Manager) -> None:
    try:
        manager.reload()
    except DispatcherError as error:
        _log.error("the configuration is not used", what=error.what, why=error.why, fix=error.fix)
