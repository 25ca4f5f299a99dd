"""The edge's own answers: redirects, refusals and error pages.

A browser gets a small page, a program a problem document (RFC 9457); both state what happened and what to do next.
None of them may be cached.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from dispatcher.common import problem

_COMMON = b"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
_HTML = (
    b"Content-Type: text/html; charset=utf-8\r\n"
    b"Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'\r\n"
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{{font:1rem/1.5 system-ui,sans-serif;max-width:36rem;margin:12vh auto;padding:0 1rem;
color:#1c1e21;background:#fff}}a{{color:#0b57d0}}small{{color:#5f6368}}
@media(prefers-color-scheme:dark){{body{{color:#e8eaed;background:#1f1f1f}}a{{color:#8ab4f8}}}}</style></head>
<body><main><h1>{title}</h1><p>{detail}</p><p>{fix}</p><p><small>{status} · request {request_id}</small></p></main>
</body></html>
"""

REASONS = {status.value: status.phrase.encode("ascii") for status in HTTPStatus}


def head(status: int, lines: bytes, length: int | None, *, close: bool) -> bytes:
    """Return the head of the edge's own answer; each of `lines` ends with CRLF."""
    start = b"HTTP/1.1 %d %b\r\n" % (status, REASONS[status])
    framing = b"" if length is None else b"Content-Length: %d\r\n" % length
    return start + lines + framing + (b"Connection: close\r\n\r\n" if close else b"\r\n")


def redirect(location: bytes, lines: bytes, *, close: bool, status: int) -> bytes:
    """Return a redirect; after 303 the next request is a GET (RFC 9110, 15.4.4)."""
    return head(status, lines + _COMMON + b"Location: " + location + b"\r\n", 0, close=close)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error that the edge answers with, in place of an agent.

    :ivar status: HTTP status; :ivar title: what; :ivar detail: why; :ivar fix: what the reader can do.
    :ivar retry_after: seconds, None if a retry makes no sense; :ivar extra: members of the document.
    :ivar challenge: lines of a 401 (RFC 9110, 15.5.2).
    """

    status: int
    code: str
    title: str
    detail: str
    fix: str = ""
    retry_after: int | None = None
    extra: dict[str, Any] | None = None
    challenge: bytes = b""


def failure(
    what: Failure, date: bytes, request_id: str, *, page: bool, close: bool, body: bool, link: str = ""
) -> bytes:
    """Return a failure's whole answer.

    :param page: for a browser; :param body: false for the answer to HEAD; :param link: HTML after `fix`.
    """
    if page:
        text = _PAGE.format(
            title=html.escape(what.title),
            detail=html.escape(what.detail),
            fix=html.escape(what.fix) + link,
            status=what.status,
            request_id=html.escape(request_id),
        ).encode()
        lines = _HTML
    else:
        document = problem.document(
            what.status, what.title, what.detail, what.fix, what.code, **(what.extra or {})
        )
        text = json.dumps(document, ensure_ascii=False).encode()
        lines = b"Content-Type: application/problem+json\r\n"
    if what.retry_after is not None:
        lines += b"Retry-After: %d\r\n" % what.retry_after
    lines += what.challenge
    answer = head(what.status, date + _COMMON + lines, len(text), close=close)
    return answer + text if body else answer


def not_signed_in(login: str) -> Failure:
    """Return the failure for a request without a session.

    :param login: path or URL of the sign-in.
    """
    return Failure(
        401,
        "unauthenticated",
        "Sign in first",
        "There is no session, or it has ended.",
        f"Sign in at {login}, which tells programs how, then try again with its cookies; or send an API token.",
        extra={"login": login},
        # `Cookie` is what this origin's sign-in hands out.
        challenge=b'WWW-Authenticate: Cookie realm="dispatcher", Bearer realm="dispatcher"\r\n',
    )


BAD_TOKEN = Failure(
    401,
    "invalid-token",
    "The API token is not valid",
    "It is unknown, has expired or was revoked.",
    "Create another one on your account page, or ask your administrator.",
    challenge=b'WWW-Authenticate: Bearer realm="dispatcher", error="invalid_token"\r\n',
)
NOT_FOR_TOKENS = Failure(
    403,
    "not-for-tokens",
    "An API token does not open this page",
    "It opens applications only; sign-in and account are for browsers.",
    "Leave the token out, and sign in.",
)


TOO_BUSY = Failure(
    503,
    "too-many-requests",
    "Too many requests at once",
    "This application already has the maximum number of requests in progress.",
    "Try again in a moment.",
    retry_after=2,
)
FULL = Failure(
    503,
    "too-many-connections",
    "Too many connections",
    "The limit of connections is reached, in total or for your address.",
    "Try again in a moment.",
    retry_after=5,
)
NO_FEED = Failure(
    503,
    "manager-away",
    "The service is being restarted",
    "The manager has not responded for a while.",
    "Try again in a moment; if this lasts, tell the administrator.",
    retry_after=5,
)
NO_AGENT = Failure(
    404,
    "not-found",
    "There is no such application",
    "This session has no application here.",
    "Check the address.",
)
GONE_AWAY = Failure(
    502,
    "upstream-failed",
    "The application closed the connection",
    "The connection ended before the response.",
    "Try again. If this repeats, read the application's log.",
)
BAD_ANSWER = Failure(
    502,
    "upstream-invalid",
    "The application's response is not valid",
    "It is not a valid HTTP response.",
    "Read the application's log.",
)
UNREACHABLE = Failure(
    502,
    "upstream-unreachable",
    "The application does not accept connections",
    "It runs, but nothing listens at its address.",
    "Try again in a moment. If this repeats, restart the application.",
    retry_after=2,
)
TOO_SLOW = Failure(
    504,
    "upstream-timeout",
    "The application did not answer in time",
    "The request was forwarded, but no response arrived.",
    "Try again, or read the application's log.",
)
SLOW_REQUEST = Failure(
    408, "request-timeout", "The request did not arrive in time", "Only part of it arrived.", "Send it again."
)
TOO_LARGE = Failure(413, "too-large", "The request is too large", "The limit here is 64 KiB.", "Send less.")
CROSS_ORIGIN = Failure(
    403,
    "cross-origin",
    "This request is refused",
    "Changes and WebSockets are accepted only from pages of this address.",
    "Open the application by its own address. Programs send an Origin header equal to it.",
)


def foreign(why: str, fix: str) -> Failure:
    """Return the failure for a change that does not come from a page of this address; see `origins.fault`."""
    detail, advice = (f"{text[:1].upper()}{text[1:]}." for text in (why, fix))
    return Failure(403, "cross-origin", CROSS_ORIGIN.title, detail, advice)


SERVICE_WORKER = Failure(
    403,
    "service-worker",
    "Refused: the service worker would cover the sign-in pages",
    "The application shares this address with the portal.",
    "Serve the script from a directory of its own, or use routing by subdomain.",
)
PORTAL_AWAY = Failure(
    503,
    "portal-away",
    "The sign-in pages are being restarted",
    "They do not answer at the moment.",
    "Try again in a moment.",
    retry_after=2,
)


def bad_request(status: int, why: str) -> Failure:
    """Return the failure for a refused head."""
    phrase = REASONS[status].decode("ascii")
    return Failure(
        status,
        "bad-request",
        phrase,
        f"The request contains {why}.",
        "The fault is in the client, or in a proxy before it.",
    )


def too_many_cookies(limit: int) -> Failure:
    """Return the failure for a browser whose cookies are larger than heads may be; the answer expires them."""
    return Failure(
        431,
        "too-many-cookies",
        "Too many cookies for this address",
        f"The browser sent more than {limit} bytes, most of them cookies of applications at this address.",
        "They have been removed, except the sign-in's. Load the page again. If this page comes back, delete the "
        "cookies of this address in the browser's settings.",
    )


def not_running(agent: dict[str, Any]) -> Failure:
    """Return the failure for a program's request to an agent that is not running; `agent` is `Agent.public`."""
    state = agent["state"]
    texts = {
        "asleep": (
            "The application is asleep",
            "Open it in a browser, or send any request that changes something.",
        ),
        "starting": ("The application is starting", "Try again in a moment."),
        "stopping": ("The application is stopping", "Try again in a moment."),
        "failed": ("The application has failed", "Open it in a browser to see why and to start it again."),
    }
    title, fix = texts.get(state, ("The application does not run", "Try again in a moment."))
    detail = agent["detail"] or agent["stage"] or f"Its state is {state}."
    retry = 30 if state in {"asleep", "failed"} else 2
    return Failure(
        503, "agent-" + (state or "unknown"), title, str(detail), fix, retry_after=retry, extra={"agent": agent}
    )
