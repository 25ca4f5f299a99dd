"""The manager's side of the log pump: start it, hand it pipes.  Touches the provider's private run directory.

Why a process of its own: agents outlive the manager and go on writing, and their output must stay bounded and
must not stall them.  An agent's standard output is a pipe that the agent holds for reading too, so that it never
gets SIGPIPE; a pump that died is replaced, and the new one gets every pipe again out of ``/proc/PID/fd/1``.
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
from pathlib import Path

from dispatcher.plugin import ProviderError
from dispatcher_subprocess import pump

_TIMEOUT = 10.0  # seconds; the pump answers within a millisecond unless the machine is overwhelmed


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


class PumpClient:
    """A connection to the installation's log pump, which it starts when there is none."""

    def __init__(self, run_dir: Path, size: int, files: int) -> None:
        self._run_dir = run_dir
        self._size = size
        self._files = files
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None

    def attach(self, read_end: int, path: Path) -> bool:
        """Hand over a pipe's read end (a copy); return whether the pump is a new one, which lacks all the others.

        :raises ProviderError: no pump can be started.
        """
        message = b"\0".join([os.fsencode(path), str(self._size).encode(), str(self._files).encode()])
        with self._lock:
            fresh = self._connect()
            try:
                self._send(message, read_end)
            except OSError:
                fresh = self._connect(again=True)
                try:
                    self._send(message, read_end)
                except OSError as error:
                    raise ProviderError("The log pump does not answer", why=str(error), fix="try again") from error
        return fresh

    def wake(self) -> bool:
        """See that a pump runs; return whether it is a new one, which lacks all pipes.

        :raises ProviderError: no pump can be started.
        """
        with self._lock:
            return self._connect(again=self._gone())

    def fileno(self) -> int | None:
        """Descriptor that hangs up when the pump dies; None while not connected."""
        return self._connection.fileno() if self._connection else None

    def close(self) -> None:
        """Leave the pump to itself."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None

    def _gone(self) -> bool:
        if not self._connection:
            return False
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)  # it never speaks: anything is its end
        return bool(poll.poll(0))

    def _send(self, message: bytes, read_end: int) -> None:
        assert self._connection is not None
        socket.send_fds(self._connection, [message], [read_end])

    def _connect(self, *, again: bool = False) -> bool:
        if again:
            self._drop()
        if self._connection:
            return False
        try:
            self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = os.open(self._run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _cannot(error) from error
        try:
            # Through the descriptor, as the whole path may exceed the 107 bytes of a socket's address.
            address = f"/proc/self/fd/{directory}/pump.sock"
            lock = os.open("pump.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                fresh = not self._try(address)
                if fresh:
                    self._start(address)
                    if not self._try(address):
                        raise ProviderError("The log pump ended at once", fix="try again")
            finally:
                os.close(lock)
        except OSError as error:
            raise _cannot(error) from error
        finally:
            os.close(directory)
        return fresh

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

    @staticmethod
    def _start(address: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(address)
            listener.listen(64)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-E", pump.__file__],
                stdin=listener.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,
            )
        threading.Thread(target=process.wait, name="log-pump-reaper", daemon=True).start()


def _cannot(error: OSError) -> ProviderError:
    return ProviderError("Cannot start the log pump", why=str(error), fix="mend the provider's run directory")
