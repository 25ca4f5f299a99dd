"""Responses: pages for browsers, JSON for programs, problem details, security headers.

`Accept` distinguishes them: a browser that opens a page names text/html.
"""

from __future__ import annotations

import math
import re
import secrets
from typing import Any

from flask import Flask, Response, g, jsonify, make_response, render_template, request
from werkzeug.exceptions import HTTPException

from dispatcher.common import problem as problems
from dispatcher.common.log import logger
from dispatcher.plugin.errors import BadRequest, DispatcherError, Forbidden, NotFound, TooManyRequests, Unavailable
from dispatcher.proxy.portal import context

_log = logger("portal")
_QUALITY = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")
_HEADINGS = {
    400: "Bad request",
    403: "Not allowed",
    404: "Page not found",
    405: "Method not allowed",
    413: "Request too large",
    429: "Too many requests",
    500: "Something went wrong",
    502: "The app did not answer",
    503: "Temporarily unavailable",
    504: "Timed out",
}


def qualities(accept: str) -> tuple[float, float]:
    """Return how much a client wants HTML, and JSON, from 0 to 1, by its `Accept` (RFC 9110, 12.5.1).

    Takes time by the length of the field; the framework's own parser takes it by the square.
    """
    html = json = 0.0
    for item in accept.lower().split(","):
        kind, *parameters = (part.strip(" \t") for part in item.split(";"))
        quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        wanted = float(quality) if _QUALITY.fullmatch(quality) else 0.0
        if kind in {"text/html", "application/xhtml+xml"}:
            html = max(html, wanted)
        elif kind.endswith(("/json", "+json")):
            json = max(json, wanted)
    return html, json


def for_programs() -> bool:
    """Whether the client requests JSON rather than a page."""
    html, json = qualities(request.headers.get("Accept", ""))
    return json > html or (request.is_json and not html)


def for_people() -> bool:
    """Whether the response is a page for a browser window: the client accepts HTML and shows it as a document."""
    html, _ = qualities(request.headers.get("Accept", ""))
    return html > 0 and not for_programs() and not inside_another_page()


def inside_another_page() -> bool:
    """Whether a script, a frame or an embedded object sent the request (Fetch Metadata).

    An app that shares the portal's origin could otherwise read a page's form tokens.
    """
    return request.headers.get("Sec-Fetch-Dest", "document") != "document"


def page(template: str, status: int = 200, *, error: DispatcherError | None = None, **values: Any) -> Response:
    """Return a page.

    :param error: shown on it; says when to try again.
    :raises Forbidden: a script or a frame requests it.
    """
    if inside_another_page():
        raise Forbidden(
            "This page is not available to scripts and frames",
            why="a script or a frame requested it",
            fix="open it in a browser window",
        )
    g.nonce = secrets.token_urlsafe(16)
    response = make_response(render_template(template, error=error, **values), status)
    response.mimetype = "text/html"
    return retry(response, error.retry_after if error else None)


def data(value: object, status: int = 200) -> Response:
    """Return JSON for programs."""
    response = jsonify(value)
    response.status_code = status
    return response


def problem(error: DispatcherError, status: int | None = None, **more: object) -> Response:
    """Return an error as problem details (RFC 9457)."""
    found = status or error.status
    document = problems.document(found, error.what, error.why, error.fix, error.code, **more)
    response = data(document, found)
    response.mimetype = problems.MEDIA_TYPE
    return retry(response, error.retry_after)


def retry(response: Response, seconds: float | None) -> Response:
    """Set `Retry-After` (RFC 9110, 10.2.3)."""
    if seconds is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(seconds)))
    return response


def request_id() -> str:
    """Return the edge's id of this request, which the logs name too; "" without one."""
    return request.headers.get("X-Request-ID", "")[:64]


def ask_administrator() -> str:
    """Return what a user can do about a fault of the service."""
    return "try again, or tell your administrator" + (f" (request ID {request_id()})" if request_id() else "")


def error_page(error: DispatcherError, status: int | None = None) -> Response:
    """Return an error as a page or as problem details; reason and fix of the service's own faults are logged."""
    if (status or error.status) >= 500:
        if error.why or error.fix:
            _log.warning("a request failed", path=request.path, request_id=request_id(), error=str(error))
        error.why, error.fix = "", ask_administrator()
    if not for_people():
        return problem(error, status)
    number = status or error.status
    heading = _HEADINGS.get(number, "Something went wrong")
    return page("error.html", number, error=error, heading=heading, number=number)


def _from_http(error: HTTPException) -> DispatcherError:
    number = error.code or 500
    known = (NotFound, Forbidden, TooManyRequests, Unavailable)
    other = BadRequest if number < 500 else DispatcherError
    cls: type[DispatcherError] = next((cls for cls in known if cls.status == number), other)
    texts = {
        404: ("Page not found", "check the address"),
        405: (f"{request.method} is not possible here", "open the page in a browser"),
        413: ("The request is too large", "send less"),
    }
    what, fix = texts.get(number, (error.name, ""))
    return cls(what, fix=fix)


def install(app: Flask) -> None:
    """Register the error pages and the headers with an application."""

    @app.errorhandler(context.NotSignedIn)
    def not_signed_in(error: context.NotSignedIn) -> Response:
        if not for_people():
            return problem(error)
        here = request.full_path.rstrip("?") if request.method in {"GET", "HEAD"} else context.local("/")
        return context.go(context.local("/login", next=here))

    @app.errorhandler(DispatcherError)
    def expected(error: DispatcherError) -> Response:
        return error_page(error)

    @app.errorhandler(HTTPException)
    def by_flask(error: HTTPException) -> Response:
        response = error_page(_from_http(error), error.code)
        if (allow := dict(error.get_headers()).get("Allow")) is not None:
            response.headers["Allow"] = allow
        return response

    @app.errorhandler(Exception)
    def unexpected(_: Exception) -> Response:
        _log.exception("a request failed", method=request.method, path=request.path, request_id=request_id())
        return error_page(DispatcherError("The portal failed"))

    app.after_request(context.keep_seed)
    app.after_request(context.drop_doubles)
    app.after_request(_headers)


def _headers(response: Response) -> Response:
    fields = response.headers
    fields.setdefault("Cache-Control", "no-store")
    fields["X-Content-Type-Options"] = "nosniff"
    # `no-referrer` would make browsers send `Origin: null` with the forms.
    fields["Referrer-Policy"] = "same-origin"
    fields["X-Frame-Options"] = "DENY"
    fields["Cross-Origin-Resource-Policy"] = "same-origin"
    # An app of the same origin that opens a page of the portal gets no handle to it.
    fields["Cross-Origin-Opener-Policy"] = "noopener-allow-popups"
    fields["Content-Security-Policy"] = _policy()
    return response


def _policy() -> str:
    rules = ["default-src 'none'", "base-uri 'none'", "frame-ancestors 'none'"]
    if (nonce := g.get("nonce")) is not None:
        # By nonce and not 'self': everything that an app serves would be 'self'.
        rules += [f"script-src 'nonce-{nonce}'", f"style-src 'nonce-{nonce}'", "img-src 'self' data:"]
        rules += ["connect-src 'self'", f"form-action {_form_targets()}"]
        rules += [f"worker-src {request.host_url.rstrip('/')}{context.local('/static/')}"]
    return "; ".join(rules)


def _form_targets() -> str:
    # Chromium applies form-action to the redirects that follow, and a sign-in may go on to an agent's host.
    portal = context.portal()
    if not portal.subdomains:
        return "'self'"
    scheme, _, host = portal.public_origin.partition("://")
    return f"'self' {scheme}://{host} {scheme}://*.{host}"
