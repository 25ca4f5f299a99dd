"""The whole of a body before the portal sees any of it.  Decides and says so to the connection; does no I/O.

Anybody may send to the portal, as slowly as they like, and its places are few: a body takes one once it is
complete.  Until then it costs memory alone, which is bounded for each connection (`PORTAL_BODY`) and in all: above
`COLLECTED` a worker takes no more than what a sign-in needs (`SMALL_BODY`), so that who fills it keeps nobody out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dispatcher.proxy.edge.http.chunked import Chunked
from dispatcher.proxy.edge.http.headers import BadHead
from dispatcher.proxy.edge.http.request import CHUNKED, Request
from dispatcher.proxy.edge.net.connection import COLLECT
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.settings import COLLECTED, PORTAL_BODY, SMALL_BODY

if TYPE_CHECKING:
    from dispatcher.proxy.edge.net.exchange import Exchange


def begin(client: Exchange, request: Request) -> None:
    """Pass a request with a body on to the portal: now when it is all here, else once it is."""
    client.state = COLLECT
    client.deadline = client.worker.now + client.worker.settings.body_timeout  # for all of it
    client.decoder = Chunked() if request.length == CHUNKED else None
    expects, request.expects = request.expects, False  # the portal has no say in it
    early, client.body = client.body, b""
    if early:
        more(client, early)
    if client.state == COLLECT and expects:
        client.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # RFC 9110, 10.1.1


def more(client: Exchange, data: bytes) -> None:
    """More of the body has come."""
    worker = client.worker
    decoder = client.decoder
    client.body += data
    client.bytes_in += len(data)
    worker.collected += len(data)
    try:
        if decoder is not None:
            decoder.feed(data)
    except BadHead as error:
        leave(client)
        client.refuse(error)
        return
    size = len(client.body)
    if decoder.done if decoder is not None else size >= client.request.length:
        leave(client)
        client.dispatch(worker.portal)
    elif size > PORTAL_BODY:
        leave(client)
        client.say(pages.TOO_LARGE)
    elif worker.collected > COLLECTED and size > SMALL_BODY:
        leave(client)
        client.say(pages.TOO_BUSY)


def expired(client: Exchange) -> None:
    """The rest did not come in time."""
    leave(client)
    client.closing = True
    client.say(pages.SLOW_REQUEST)


def leave(client: Exchange) -> None:
    """Collect no more; what has come stays with the connection, and is the request's affair from now on."""
    client.worker.collected -= len(client.body)
    client.decoder = None
