"""The plain HTTP listener that redirects to HTTPS.

It uses neither sessions nor agents.  308 keeps the method and the body (RFC 9110, 15.4.9), GET and HEAD get the
customary 301.
"""

from __future__ import annotations

import asyncio

from dispatcher.proxy.edge.http.headers import BadHead
from dispatcher.proxy.edge.http.request import parse_request
from dispatcher.proxy.edge.net.clients import Clients
from dispatcher.proxy.edge.routing import pages

_MAX_HEAD = 16384
_TIMEOUT = 10.0


class Redirect(asyncio.Protocol):
    """One connection; it gets one answer."""

    __slots__ = ("_address", "_clients", "_data", "_timer", "_transport")

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._timer = self._clients.context.loop.call_later(_TIMEOUT, self._transport.abort)
        self._address = self._clients.address_of(self._transport)
        if not self._clients.opened(self._address, exempt=self._clients.exempt(self._address)):
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0 and len(self._data) <= _MAX_HEAD:
            return
        try:
            if end < 0:
                raise BadHead("a head that is too large", 431)
            request = parse_request(self._data[: end + 4], self._clients.context.settings.head_fields)
            answer = self._answer(request.target, request.host, request.method)
        except BadHead as error:
            answer = pages.head(error.status, self._clients.context.date_line, 0, close=True)
        self._transport.write(answer)
        self._transport.close()

    def _answer(self, target: bytes, authority: bytes, method: bytes) -> bytes:
        settings = self._clients.context.settings
        name = (
            authority.lower().rpartition(b":")[0] if b":" in authority.rpartition(b"]")[2] else authority.lower()
        )
        host = settings.public_host or name
        if settings.subdomain and name.endswith(b"." + settings.domain):
            host = name + settings.public_host[len(settings.domain) :]
        if not host or target == b"*":
            raise BadHead("no Host header")
        status = 301 if method in {b"GET", b"HEAD"} else 308
        return pages.redirect(
            b"https://" + host + target, self._clients.context.date_line, close=True, status=status
        )

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._timer.cancel()
        self._clients.closed(self._address)
