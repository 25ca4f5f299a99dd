"""The access log: one JSON object a line.

It holds no secret: no header, no cookie, no body, and of the target only the path, because queries carry passwords
and tokens (``"query": true`` marks that there was one).  Lines are written together, once a second or per 64 KiB.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from typing import Any, Protocol

from dispatcher.proxy.edge.routing.table import Agent, Session

_TOGETHER = 65536
_MOST = 4 * 1024 * 1024  # bytes kept while the file takes nothing
_LONGEST_PATH = 2048

_quote = json.encoder.encode_basestring_ascii


def _token(session: Session | None) -> str:
    """Return the member with the public id of an API token."""
    return f',"token":"{session.digest[:8].hex()}"' if session is not None and session.bearer else ""


class Logged(Protocol):
    """An exchange; `exchange.Exchange` describes the members."""

    request: Any
    request_id: bytes
    bytes_in: int
    bytes_out: int


class AccessLog:
    """The log of one worker.

    :ivar on: whether anything is logged; :ivar lost: lines that could not be written.
    """

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self.on = fd is not None
        self.lost = 0
        self._lines: list[bytes] = []
        self._size = 0
        self._due = _TOGETHER  # size at which lines are written, before the next second
        self._time = ""
        self._time_of = 0.0

    def write(
        self,
        exchange: Logged,
        agent: Agent | None,
        status: int,
        remote: bytes,
        session: Session | None,
        now: float,
        seconds: float,
    ) -> None:
        """Log one exchange; `remote` is the client's address, `seconds` its duration."""
        if now != self._time_of:
            self._time_of = now
            self._time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        request = exchange.request
        method, target = (request.method, request.target) if request is not None else (b"", b"")
        path, query, _ = target.partition(b"?")
        named = agent is not None and agent.name
        line = (
            f'{{"time":"{self._time}","id":"{exchange.request_id.decode("ascii")}",'
            f'"client":"{remote.decode("ascii")}","method":"{method.decode("ascii")}",'
            f'"path":{_quote(path[:_LONGEST_PATH].decode("ascii"))},"query":{"true" if query else "false"},'
            f'"status":{status},"in":{exchange.bytes_in},"out":{exchange.bytes_out},'
            f'"ms":{seconds * 1000:.1f},'
            f'"user":{_quote(session.user) if session is not None else "null"},'
            f'"agent":{_quote(agent.name) if agent is not None and named else "null"},'
            f'"app":{_quote(agent.app) if agent is not None and named else "null"}{_token(session)}}}\n'
        )
        if self._size > _MOST:
            self.lost += 1
            return
        self._lines.append(line.encode("ascii"))
        self._size += len(line)
        if self._size >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write the lines so far; a full disk or a stuck pipe loses lines, never a request."""
        if not self._lines or self._fd is None:
            return
        data = b"".join(self._lines)
        self._lines.clear()
        try:
            written = os.write(self._fd, data)
        except OSError:
            written = 0
        rest = data[written:]
        if rest:
            self._lines.append(rest)
        self._size = len(rest)
        self._due = self._size + _TOGETHER
