r"""The log collector: one small process per installation that writes agents' output to bounded, rotated files.

Run as ``python -I -S log_collector.py ROOT``, where ROOT holds the package `dispatcher`, with its listening
socket as standard input.  It outlives the manager, so that agents can write while there is none.  It imports few
modules, to save memory.  A manager connects (SOCK_SEQPACKET) and sends, with one pipe's read end each:
``PATH\0SIZE\0FILES``; there is no answer.  When a file cannot be written (disk full) output is dropped: an agent
is never blocked by its log, unless all together write faster than RATE: then writers wait, so that a flood costs
neither the processor nor the disk. It ends by itself when no manager is connected and no agent has its pipe
open.

Agents with a private network have two more descriptors: the UDP and the TCP socket of a name server at their own
127.0.0.1.  Their queries go to the servers that the host's /etc/resolv.conf names at that moment: names are found
when the host has changed its network, has slept, or resolves names by a service of its own at 127.0.0.53.
"""

from __future__ import annotations

import _socket
import _thread
import os
import select
import sys
import time

if __name__ == "__main__":
    sys.path.append(sys.argv[1])

from dispatcher.plugin.processes.rotated_log import RotatedLog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CHUNK = 65536
RATE = 16 << 20  # bytes per second, of all agents
QUERY = 16384  # bytes of output that a DNS query is worth, as it costs about as much time
ANSWER = 5.0  # seconds for the answer to a query
PENDING = 256  # queries per agent that wait for their answers
QUERIES = 50  # per second and agent: each takes an entry of the host's table of tracked connections
BURST = 1000  # queries before that rate applies
CONNECTIONS = 16  # per agent that wait for theirs
IDLE = 5.0  # seconds without managers and agents until it ends
SWEEP = 1.0  # seconds between two looks for queries that expired
RESOLV_CONF = "/etc/resolv.conf"


class Names:
    """Passes the DNS queries of an agent with a private network to the host's name servers of the moment.

    Its sockets are in the agent's network namespace, those of its own queries in the host's.
    """

    def __init__(self, collector: Collector, udp: _socket.socket, tcp: _socket.socket) -> None:
        self.collector = collector
        self.udp, self.tcp = udp, tcp
        self.pending: dict[int, tuple[_socket.socket, Any, float]] = {}  # descriptor -> upstream, client, expiry
        self.connections: set[int] = set()
        self.turn = 0  # of the name servers
        self.allowance, self.renewed = float(BURST), time.monotonic()  # queries that may pass
        for sock, handler in ((udp, self._query), (tcp, self._connection)):
            sock.setblocking(False)
            collector.watch(sock.fileno(), handler)

    def close(self) -> None:
        """Close all sockets but those of TCP connections, which end by themselves."""
        while self.pending:
            self._forget(next(iter(self.pending)))
        for sock in (self.udp, self.tcp):
            self.collector.forget(sock.fileno())
            sock.close()

    def _query(self, _: int) -> None:
        try:
            question, client = self.udp.recvfrom(65535)
        except OSError:
            return
        self.collector.unpaid += QUERY
        now = time.monotonic()
        if not self._allowed(now):
            return
        self.sweep(now)
        if len(self.pending) >= PENDING:
            self._forget(next(iter(self.pending)))
        servers = name_servers()
        for number in range(len(servers)):
            family, address = servers[(self.turn + number) % len(servers)]
            try:
                upstream = _socket.socket(family, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
            except OSError:  # no descriptor is left: the client asks again
                return
            try:
                upstream.setblocking(False)
                upstream.connect(address)
                upstream.send(question)
            except OSError:
                upstream.close()
                continue
            self.pending[upstream.fileno()] = upstream, client, now + ANSWER
            self.collector.watch(upstream.fileno(), self._answer)
            return

    def _allowed(self, now: float) -> bool:
        """Whether one more query may pass (a token bucket); a client repeats one that is dropped."""
        self.allowance = min(BURST, self.allowance + (now - self.renewed) * QUERIES)
        self.renewed = now
        if self.allowance < 1:
            return False
        self.allowance -= 1
        return True

    def sweep(self, now: float) -> None:
        """Drop the queries that expired."""
        late = [fd for fd, (_, _, expiry) in self.pending.items() if expiry < now]
        self.turn += bool(late)  # the next server, as this one does not answer
        for fd in late:
            self._forget(fd)

    def _answer(self, fd: int) -> None:
        upstream, client, _ = self.pending[fd]
        try:
            answer = upstream.recv(65535)
        except BlockingIOError:  # it was damaged
            return
        except OSError:
            self.turn += 1
            self._forget(fd)
            return
        try:
            self.udp.sendto(answer, client)
        except OSError:
            self.turn += 1
        self._forget(fd)

    def _forget(self, fd: int) -> None:
        self.collector.forget(fd)
        self.pending.pop(fd)[0].close()

    def _connection(self, _: int) -> None:
        try:
            fd, _address = self.tcp._accept()  # type: ignore[attr-defined]  # noqa: SLF001
        except OSError:
            return
        if len(self.connections) >= CONNECTIONS or not self._allowed(time.monotonic()):
            os.close(fd)
            return
        self.connections.add(fd)
        try:
            _thread.start_new_thread(self._serve, (fd,))
        except RuntimeError:  # no thread can be had
            self.connections.discard(fd)
            os.close(fd)

    def _serve(self, fd: int) -> None:
        """Answer one query over TCP, in a thread of its own."""
        sockets = [_socket.socket(fileno=fd)]
        try:
            sockets[0].settimeout(ANSWER)
            question = receive(sockets[0])
            for family, address in name_servers():
                sockets.append(_socket.socket(family, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC))
                sockets[-1].settimeout(ANSWER)
                if not sockets[-1].connect_ex(address):
                    sockets[-1].sendall(question)
                    sockets[0].sendall(receive(sockets[-1]))
                    break
        except OSError:
            pass
        finally:
            self.connections.discard(fd)
            for sock in sockets:
                sock.close()


def receive(sock: _socket.socket) -> bytes:
    """Receive a DNS message over TCP, with its length in two bytes before it.

    :raises OSError: the connection ends before, or nothing comes in time.
    """
    data = b""
    while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
        if not (chunk := sock.recv(65537)):
            raise OSError
        data += chunk
    return data


def name_servers() -> list[tuple[int, Any]]:
    """Return family and address of the host's present name servers, 127.0.0.1 without any (resolv.conf(5)).

    Their words stay bytes: for text `getaddrinfo` imports the codec idna, which takes memory and raises errors.
    """
    try:
        with open(RESOLV_CONF, "rb") as file:
            lines = file.read(65536).splitlines()
    except OSError:
        lines = []
    found: list[tuple[int, Any]] = []
    for words in map(bytes.split, lines):
        if words[:1] == [b"nameserver"] and words[1:]:
            try:
                info = _socket.getaddrinfo(words[1], 53, type=_socket.SOCK_DGRAM, flags=_socket.AI_NUMERICHOST)
            except (OSError, ValueError):
                continue
            found.append((int(info[0][0]), info[0][4]))
    return found or [(int(_socket.AF_INET), ("127.0.0.1", 53))]


class Collector:
    """The connections of managers, the pipes of agents and their log files."""

    def __init__(self, listener: _socket.socket) -> None:
        self.listener = listener
        self.poll = select.epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.managers: dict[int, _socket.socket] = {}
        self.pipes: dict[int, tuple[int, RotatedLog]] = {}  # descriptor -> inode, log
        self.logs: dict[str, list[int]] = {}  # path -> descriptors that write there
        self.names: dict[str, Names] = {}  # path -> those of the same agent
        self.unpaid = 0  # bytes taken since the last pause
        self.swept = 0.0  # when expired queries were looked for
        self.watch(listener.fileno(), self._accept)

    def watch(self, fd: int, handler: Callable[[int], None]) -> None:
        """Call a handler when a descriptor can be read."""
        self.handlers[fd] = handler
        self.poll.register(fd, select.EPOLLIN)

    def forget(self, fd: int) -> None:
        """Undo `watch`."""
        self.poll.unregister(fd)
        del self.handlers[fd]

    def run(self) -> None:
        """Serve until there are no managers and no agents."""
        while True:
            idle = not self.managers and not self.pipes
            asking = any(names.pending for names in self.names.values())
            events = self.poll.poll(IDLE if idle else SWEEP if asking else -1)
            if idle and not events:
                return
            now = time.monotonic()
            if asking and now >= self.swept + SWEEP:
                self.swept = now
                for names in self.names.values():
                    names.sweep(now)
            for fd, _ in events:
                if handler := self.handlers.get(fd):
                    handler(fd)
            if self.unpaid > CHUNK:
                time.sleep(self.unpaid / RATE)
                self.unpaid = 0

    def _accept(self, _: int) -> None:
        try:
            fd, _address = self.listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001  the C type has no other
        except OSError:
            return
        self.managers[fd] = _socket.socket(fileno=fd)
        self.managers[fd].setblocking(False)
        self.watch(fd, self._command)

    def _command(self, manager: int) -> None:
        try:
            message, controls, _, _ = self.managers[manager].recvmsg(16384, 64, _socket.MSG_CMSG_CLOEXEC)
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
            self.forget(manager)
            self.managers.pop(manager).close()
        elif fds:  # none if no descriptor is left here
            path, size, files = message.split(b"\0")
            self._attach(fds, os.fsdecode(path), int(size), int(files))

    def _attach(self, fds: list[int], path: str, size: int, files: int) -> None:
        pipe, *sockets = fds
        if len(sockets) == 2:
            if path in self.names:
                self.names.pop(path).close()
            udp, tcp = (_socket.socket(fileno=fd) for fd in sockets)
            self.names[path] = Names(self, udp, tcp)
        elif sockets:
            os.close(sockets[0])
        inode = os.fstat(pipe).st_ino
        if any(inode == known for known, _ in self.pipes.values()):
            os.close(pipe)
            return
        others = self.logs.setdefault(path, [])
        log = self.pipes[others[0]][1] if others else RotatedLog(path, size, files)
        log.size, log.files = size, files
        others.append(pipe)
        os.set_blocking(pipe, False)
        self.pipes[pipe] = (inode, log)
        self.watch(pipe, self._drain)

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
        self.forget(fd)
        os.close(fd)
        del self.pipes[fd]
        others = self.logs[log.path]
        others.remove(fd)
        if not others:
            log.close()
            del self.logs[log.path]
            if log.path in self.names:
                self.names.pop(log.path).close()


def main() -> None:
    """Take the listener from standard input and run."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Collector(_socket.socket(fileno=0)).run()


if __name__ == "__main__":
    main()
