"""An agent's output: the pipe that it writes to, the connection to the log collector, reading its log files.

The collector (`log_collector`) is a process of its own, because agents keep writing while the manager is down.
An agent's standard output is a pipe that the agent has open for reading too, so that it never gets SIGPIPE; a new
collector gets every pipe again from ``/proc/PID/fd/1``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import dispatcher
from dispatcher.plugin import ProviderError
from dispatcher_subprocess import log_collector
from dispatcher_subprocess.errors import failed

_TIMEOUT = 10.0  # seconds; the collector answers within a millisecond unless the host is overloaded
FILE = "output.log"
_ROOT = Path(dispatcher.__file__).parents[1]


def log_file(log_dir: str | Path) -> Path:
    """Return the current log file in an agent's log directory."""
    return Path(log_dir) / FILE


def output_pipe(uid: int, gid: int) -> tuple[int, int]:
    """Return a pipe's read end, and an end for the agent's standard output that is open both ways.

    It belongs to the agent, so that an app may open ``/dev/stdout`` by name.
    """
    read_end, write_end = os.pipe()
    try:
        both = os.open(f"/proc/self/fd/{write_end}", os.O_RDWR | os.O_CLOEXEC)
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    if os.geteuid() == 0:
        os.fchown(both, uid, gid)
    return read_end, both


class LogCollector:
    """A connection to the installation's log collector, which is started if it does not run.

    :param started: called with the process id of a new collector.
    """

    def __init__(self, run_dir: Path, size: int, files: int, started: Callable[[int], None]) -> None:
        self._run_dir = run_dir
        self._started = started
        self._limits = b"%d\0%d" % (size, files)
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None

    def attach(self, fds: Sequence[int], path: Path) -> bool:
        """Pass copies of an agent's descriptors; return whether the collector is new and needs all others.

        :param fds: the pipe's read end, then the sockets for DNS if there are any.

        :raises ProviderError: no collector can be started.
        """
        message = os.fsencode(path) + b"\0" + self._limits
        with self._lock:
            for last in (False, True):
                new = self._connect()
                assert self._connection is not None
                try:
                    socket.send_fds(self._connection, [message], fds)
                    break
                except OSError as error:
                    self._drop()
                    if last:
                        raise failed("The log collector does not answer", error, fix="try again") from error
        return new

    def ensure(self) -> bool:
        """Start the collector if it does not run; return whether it is new and needs all pipes.

        :raises ProviderError: it cannot be started.
        """
        with self._lock:
            if self._connection:
                poll = select.poll()
                poll.register(self._connection, select.POLLIN)
                if poll.poll(0):  # it sends nothing: any event is its end
                    self._drop()
            return self._connect()

    def fileno(self) -> int | None:
        """Descriptor that hangs up when the collector ends; None while not connected."""
        return self._connection.fileno() if self._connection else None

    def close(self) -> None:
        """Disconnect; the collector goes on."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None

    def _connect(self) -> bool:
        """Connect, unless that is done; return whether a collector was started for it."""
        if self._connection:
            return False
        try:
            self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                directory = os.open(self._run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, directory)
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                lock = os.open("collector.lock", flags, 0o600, dir_fd=directory)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
                # Through the descriptor, as the whole path may exceed the 107 bytes of a socket's address.
                address = f"/proc/self/fd/{directory}/collector.sock"
                new = not self._try(address)
                if new:
                    self._start(address)
                    if not self._try(address):
                        raise ProviderError("The log collector ended at once", fix="try again")
        except OSError as error:
            raise failed(
                "Cannot start the log collector", error, fix="repair the provider's run directory"
            ) from error
        return new

    def _try(self, address: str) -> bool:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(_TIMEOUT)
        try:
            connection.connect(address)
        except OSError:
            connection.close()
            return False
        self._connection = connection
        return True

    def _start(self, address: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(address)
            listener.listen(64)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", log_collector.__file__, str(_ROOT)],
                stdin=listener.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,
            )
        self._started(process.pid)
        threading.Thread(target=process.wait, name="log-collector", daemon=True).start()
