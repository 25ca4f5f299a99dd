"""The manager's process: signals, systemd, exit.

SIGTERM and SIGINT stop it: `run` leaves its loop and calls `Manager.close`, which closes the listeners, then the
supervisor's threads, then the database; agents continue to run.  A start that still waits, for a plugin or the
database, is broken off.  SIGHUP reads the configuration again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from dispatcher.common import log, systemd
from dispatcher.config.load import Config
from dispatcher.manager.app import Manager
from dispatcher.plugin.errors import DispatcherError

EXIT = 5.0  # seconds for the end of the process, once the manager is closed
WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_log = log.logger("manager")


def run(config: Config, path: Path | None = None) -> int:
    """Run the manager in the foreground.

    :param path: of the configuration file; None: the default ones.
    :return: the exit code.
    :raises DispatcherError: it cannot start.
    """
    log.configure(config.manager.log_level, config.manager.log_format)
    # Taken out of the environment: agents must not inherit it.
    notify = functools.partial(systemd.notify, address=os.environ.pop(systemd.VARIABLE, ""))
    manager = Manager(config, path)
    with _signals() as arrived:
        try:
            with _interruptible():
                manager.start()
            notify("READY=1")
            for number in arrived:
                if number != signal.SIGHUP:
                    break
                _reload(manager)
            _log.info("stopping; agents continue to run until `dispatcher stop NAME`")
            notify("STOPPING=1")
        except KeyboardInterrupt:
            _log.info("stopped before it was ready")
        finally:
            manager.close()
            _end_within(EXIT)
    return 0


def _end_within(seconds: float) -> None:
    """End this process by force if it lives then: a thread or an exit handler of a plugin may hang."""

    def end() -> None:
        _log.error("the manager did not end in time, and is ended: a plugin's thread or exit handler hangs")
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def _signals() -> Iterator[Iterator[int]]:
    """Yield signals as they arrive.

    Through a pipe: the kernel may deliver a signal to any thread, which does not interrupt a main thread that
    waits for a lock.
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


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let the first signal that stops the manager raise `KeyboardInterrupt` inside the block."""
    stopping = (signal.SIGTERM, signal.SIGINT)

    def disarm() -> None:
        for number in stopping:
            signal.signal(number, lambda *_: None)

    def interrupt(*_: object) -> None:
        disarm()
        raise KeyboardInterrupt

    for number in stopping:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        disarm()


def _reload(manager: Manager) -> None:
    try:
        manager.reload()
    except DispatcherError as error:
        _log.error("the new configuration is not applied", what=error.what, why=error.why, fix=error.fix)
    except Exception:
        _log.exception("the new configuration is not applied", fix="report this fault; the earlier one is in use")
