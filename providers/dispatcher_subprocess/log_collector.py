r"""The log collector: one small process per installation that writes agents' output to bounded, rotated files.

Run as ``python -I -S -E log_collector.py`` with its listening socket as standard input.  It outlives the
manager, so that agents can write while there is none.  It imports few modules, to save memory.  A manager connects
(SOCK_SEQPACKET) and sends, with one pipe's read end each: ``PATH\0SIZE\0FILES``; there is no answer.  When a
file cannot be written (disk full) output is dropped: an agent is never blocked by its log, unless all together
write faster than RATE: then writers wait, so that a flood costs neither the processor nor the disk.
It ends by itself when no manager is connected and no agent has its pipe open.
"""

import _socket
import os
import select
import sys
import time

CHUNK = 65536
RATE = 16 << 20  # bytes per second, of all agents
IDLE = 5.0  # seconds without managers and agents until it ends
FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


class Log:
    """A rotated file: PATH is the current one, PATH.1 the one before, and so on."""

    def __init__(self, path: str, size: int, files: int) -> None:
        self.path = path
        self.size = size
        self.files = files
        self.fd = -1
        self.used = 0
        self.dropped = 0

    def write(self, data: bytes) -> None:
        """Append, rotating before the file grows beyond its size; what cannot be written is dropped."""
        try:
            if self.dropped and self.fd >= 0:
                note = b"\n[%d bytes of output were dropped here: the log could not be written]\n" % self.dropped
                self.dropped = 0
                self._put(note)
            self._put(data)
        except OSError:
            self.dropped += len(data)
            self.close()

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self.fd >= 0 and self.used >= self.size:
                self._rotate()
            if self.fd < 0:
                self.fd = os.open(self.path, FLAGS, 0o600)
                self.used = os.fstat(self.fd).st_size
                continue
            done = os.write(self.fd, view[: max(1, self.size - self.used)])
            self.used += done
            view = view[done:]

    def _rotate(self) -> None:
        self.close()
        if self.files == 1:
            os.truncate(self.path, 0)
        for number in range(self.files - 1, 0, -1):
            older = f"{self.path}.{number}"
            newer = f"{self.path}.{number - 1}" if number > 1 else self.path
            try:
                os.rename(newer, older)
            except FileNotFoundError:
                pass

    def close(self) -> None:
        """Close the file; the next write opens it again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Collector:
    """The connections of managers, the pipes of agents and their log files."""

    def __init__(self, listener: _socket.socket) -> None:
        self.listener = listener
        self.poll = select.epoll()
        self.poll.register(listener.fileno(), select.EPOLLIN)
        self.managers: dict[int, _socket.socket] = {}
        self.pipes: dict[int, tuple[int, Log]] = {}  # descriptor -> inode, log
        self.logs: dict[str, list[int]] = {}  # path -> descriptors that write there
        self.unpaid = 0  # bytes taken since the last pause

    def run(self) -> None:
        """Serve until there are no managers and no agents."""
        while True:
            events = self.poll.poll(IDLE if not self.managers and not self.pipes else -1)
            if not events:
                return
            for fd, _ in events:
                if fd == self.listener.fileno():
                    self._accept()
                elif fd in self.managers:
                    self._command(self.managers[fd])
                elif fd in self.pipes:
                    self._drain(fd)
            if self.unpaid > CHUNK:
                time.sleep(self.unpaid / RATE)
                self.unpaid = 0

    def _accept(self) -> None:
        try:
            fd, _ = self.listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001  the C type has no other
        except OSError:
            return
        manager = _socket.socket(fileno=fd)
        manager.setblocking(False)
        self.managers[fd] = manager
        self.poll.register(fd, select.EPOLLIN)

    def _command(self, manager: _socket.socket) -> None:
        try:
            message, controls, _, _ = manager.recvmsg(16384, 64, _socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            message, controls = b"", []
        fds = [
            int.from_bytes(data[at : at + 4], sys.byteorder)
            for level, kind, data in controls
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS
            for at in range(0, len(data), 4)
        ]
        if not message:
            self.poll.unregister(manager.fileno())
            del self.managers[manager.fileno()]
            manager.close()
            return
        path, size, files = message.split(b"\0")
        for fd in fds:
            self._attach(fd, os.fsdecode(path), int(size), int(files))

    def _attach(self, fd: int, path: str, size: int, files: int) -> None:
        inode = os.fstat(fd).st_ino
        if any(inode == known for known, _ in self.pipes.values()):
            os.close(fd)
            return
        others = self.logs.setdefault(path, [])
        log = self.pipes[others[0]][1] if others else Log(path, size, files)
        log.size, log.files = size, files
        others.append(fd)
        os.set_blocking(fd, False)
        self.pipes[fd] = (inode, log)
        self.poll.register(fd, select.EPOLLIN)

    def _drain(self, fd: int) -> None:
        _, log = self.pipes[fd]
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.unpaid += len(data)
            log.write(data)
            return
        self.poll.unregister(fd)
        os.close(fd)
        del self.pipes[fd]
        others = self.logs[log.path]
        others.remove(fd)
        if not others:
            log.close()
            del self.logs[log.path]


def main() -> None:
    """Take the listener from standard input and run."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Collector(_socket.socket(fileno=0)).run()


if __name__ == "__main__":
    main()
