"""Memory that the kernel keeps for the sockets of a network namespace: queues, errors, data that is not sent yet.

sock_diag(7) tells it for each socket that has an address or a connection, also for those that no process has.
Where the kernel lacks it, the queues of /proc/PID/net are read: they tell a connection's data, not its memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

_SOCK_DIAG, _BY_FAMILY, _ERROR, _DONE = 4, 20, 2, 3  # NETLINK_SOCK_DIAG and types of messages
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_MEMORY = 7  # INET_DIAG_SKMEMINFO
_STATES = 0xFFF & ~(1 << 6)  # all but TIME_WAIT, which is a record without queues
_HEADER, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")
_REQUEST = struct.Struct("=BBBxI48x")
_BODY = 72  # bytes of struct inet_diag_msg, before the attributes
#: The first of SK_MEMINFO: received, receive buffer, being sent, send buffer, reserved, to send, options, backlog.
_VALUES = struct.Struct("=8I")
_CLONE_NEWNET = 0x40000000
_LARGEST = 1 << 16  # bytes of an answer
_TIMEOUT = 1.0  # seconds; the kernel answers at once
UDP_LITE = 136
#: Protocol -> its files in /proc/PID/net, where the kernel does not tell its memory.
PROTOCOLS = {
    socket.IPPROTO_TCP: ("tcp", "tcp6"),
    socket.IPPROTO_UDP: ("udp", "udp6"),
    UDP_LITE: ("udplite", "udplite6"),
    socket.IPPROTO_RAW: ("raw", "raw6"),
}
_INTERNET = (b"TCP", b"UDP", b"RAW", b"PING", b"MPTCP")  # begins of their names in /proc/PID/net/protocols
_OTHERS = ("icmp", "icmp6")  # sockets of ping, without sock_diag


def socket_memory(process: Path) -> tuple[int, int]:
    """Return the bytes that TCP sockets hold in the network namespace of a process, and those that others hold.

    :param process: its directory in /proc; (0, 0) if it is gone.
    """
    with _connect(process) or contextlib.nullcontext() as diag:
        held = {protocol: _of_protocol(process, diag, protocol) for protocol in PROTOCOLS}
    tcp = held.pop(socket.IPPROTO_TCP)
    return tcp, sum(held.values()) + sum(_queues(process, _OTHERS))


def unlisted(process: Path) -> int:
    """Return the number of sockets in the network namespace of a process that no list has: without an address."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        used = int((process / "net/sockstat").read_bytes().split(b"\n", 1)[0].split()[2])
        return used - sum(_listed(process).values())
    return 0


def internet_sockets(process: Path) -> int:
    """Return the number of sockets with an address of IPv4 or IPv6 in the network namespace of a process."""
    return sum(number for name, number in _listed(process).items() if name.startswith(_INTERNET))


def _listed(process: Path) -> dict[bytes, int]:
    """Return the number of sockets of each protocol in the network namespace of a process."""
    with contextlib.suppress(OSError):
        lines = (process / "net/protocols").read_bytes().splitlines()[1:]
        return {name: int(number) for name, _, number, *_ in map(bytes.split, lines)}
    return {}


def _connect(process: Path) -> socket.socket | None:
    """Open a socket in the network namespace of a process: in a thread, which enters it for good."""
    found: list[socket.socket] = []

    def enter() -> None:
        with contextlib.suppress(OSError):
            namespace = os.open(process / "ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None).setns(namespace, _CLONE_NEWNET) == 0:
                    found.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG))
            finally:
                os.close(namespace)

    thread = threading.Thread(target=enter, name="socket-memory")
    thread.start()
    thread.join()
    for each in found:
        each.settimeout(_TIMEOUT)
    return found[0] if found else None


def _of_protocol(process: Path, diag: socket.socket | None, protocol: int) -> int:
    with contextlib.suppress(OSError):
        if diag is not None:
            return sum(sum(_dump(diag, family, protocol)) for family in (socket.AF_INET, socket.AF_INET6))
    return sum(_queues(process, PROTOCOLS[protocol]))


def _dump(diag: socket.socket, family: int, protocol: int) -> Iterator[int]:
    """Yield the bytes that each socket holds.

    :raises OSError: the kernel lacks this for the protocol.
    """
    body = _REQUEST.pack(family, protocol, 1 << _MEMORY - 1, _STATES)
    diag.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _DUMP, 0, 0) + body)
    while True:
        data, at = diag.recv(_LARGEST), 0
        while at < len(data):
            length, kind, *_ = _HEADER.unpack_from(data, at)
            if kind == _DONE:
                return
            if kind == _ERROR:
                raise OSError(-struct.unpack_from("=i", data, at + _HEADER.size)[0], "sock_diag")
            yield from _held(data, at + _HEADER.size + _BODY, at + length)
            at += length + 3 & ~3


def _held(data: bytes, at: int, end: int) -> Iterator[int]:
    """Yield what the attributes of a socket tell of its memory."""
    while at < end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if kind == _MEMORY:
            received, _, sending, _, _, to_send, options, backlog = _VALUES.unpack_from(data, at + _ATTRIBUTE.size)
            yield received + max(sending, to_send) + options + backlog
        at += max(length, _ATTRIBUTE.size) + 3 & ~3


def _queues(process: Path, names: tuple[str, ...]) -> Iterator[int]:
    """Yield the bytes in the queues of each socket in files of /proc/PID/net."""
    for name in names:
        with contextlib.suppress(OSError), (process / "net" / name).open("rb") as file:
            for line in itertools.islice(file, 1, None):
                sending, _, received = line.split()[4].partition(b":")
                yield int(sending, 16) + int(received, 16)
