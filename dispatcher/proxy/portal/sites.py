"""Signing in at another site, such as an OpenID provider.

`start` sends the browser there and gives it a random cookie; the manager knows the cookie's hash and the *state*
that the site sends back.  `callback` takes the answer to the manager, with the cookie: an answer that somebody
else began is not valid in this browser.  The cookie is `SameSite=Lax`: browsers send it when the site leads them
back, but not with what pages of other sites request.
"""

from __future__ import annotations

from contextlib import suppress

from flask import Blueprint, Response, request

from dispatcher.plugin.errors import (
    BadRequest,
    DispatcherError,
    Forbidden,
    NotFound,
    TooManyRequests,
    Unavailable,
)
from dispatcher.proxy.portal import context, csrf, redirect_targets, responses, sign_in

pages = Blueprint("sites", __name__)
NONCE_AGE = 600  # seconds
MAX_NEXT = 4096  # characters
MAX_PARAMETERS, MAX_PARAMETER = 20, 8192
RETRY = 2.0  # seconds


@pages.get("/start/<name>")
def start(name: str) -> Response:
    """Send the browser to the site."""
    portal = context.portal()
    target = _target(request.args.get("next"))
    _check_host()
    if portal.public_host and request.host.lower() != portal.public_host:  # the site sends the browser to that one
        return context.go(portal.public_origin + context.local(f"/start/{name}", next=target))
    if request.headers.get("Sec-Fetch-Site", "none") not in {"none", "same-origin"} and context.person():
        # A page of another site must not replace the session, which closes its connections.
        return context.go(context.local("/login", next=target))
    nonce = _nonce() or csrf.new_seed()  # two tabs that begin at once share one
    try:
        with sign_in.slot(portal.site_logins):
            url = portal.login_client.begin_sign_in(name, context.sha256(nonce), context.address(), target)["url"]
    except (TooManyRequests, Unavailable) as error:
        return _failed(name, error, target)
    response = context.go(url)
    context.set_cookie(response, portal.cookies.signin, nonce, NONCE_AGE)
    return response


@pages.get("/callback/<name>")
def callback(name: str) -> Response:
    """Take the answer of the site, and begin a new session."""
    portal = context.portal()
    _check_host()
    nonce = _nonce()
    try:
        parameters = _parameters()
        if not nonce:
            raise Forbidden(
                "The sign-in cannot be completed",
                why="it did not begin in this browser, took over ten minutes, or the browser accepts no cookies",
                fix="start again",
            )
        agent = request.headers.get("User-Agent", "")[:512]
        with sign_in.slot(portal.site_logins):
            answer = portal.login_client.finish_sign_in(
                name, parameters, nonce, context.address(), agent, context.device_token()
            )
    except TooManyRequests as error:  # the sign-in is still valid: the page loads itself again
        raise Unavailable("Too many sign-ins at once", retry_after=error.retry_after or RETRY) from error
    except (BadRequest, Forbidden, Unavailable) as error:
        return _failed(name, error, _target(error.details.get("next")))
    return sign_in.enter(answer, _target(answer["next"]))


@pages.post("/backchannel/<name>")
def ended(name: str) -> Response:
    """End the sessions that the site says have ended there (Back-Channel Logout 1.0, section 2.5)."""
    if context.on_agent_host():
        raise NotFound("Page not found")
    token = request.form.get("logout_token", "")
    if not token:
        return responses.problem(BadRequest("There is no logout_token"))
    try:
        context.portal().login_client.ended_elsewhere(name, token, context.address())
    except DispatcherError as error:
        return responses.problem(error)
    return Response(status=200)


def _check_host() -> None:
    """Return if a browser window opens the page on the portal's own host.

    :raises NotFound: it is the host of an app; :raises Forbidden: a script or a frame requests it.
    """
    if context.on_agent_host():
        raise NotFound("Page not found")
    if responses.inside_another_page():
        raise Forbidden("This page is not available to scripts and frames", fix="open it in a browser window")


def _nonce() -> str:
    return context.only_cookie(context.portal().cookies.signin, csrf.SEED)


def _target(raw: object) -> str:
    found = redirect_targets.own_path(raw if isinstance(raw, str) else None, context.portal().prefix)
    return found if len(found) <= MAX_NEXT else "/"


def _parameters() -> dict[str, str]:
    """Return the parameters of the answer.

    :raises BadRequest: one is there twice (RFC 6749, 3.1), or there is too much.
    """
    found = dict(request.args.lists())
    if len(found) > MAX_PARAMETERS or any(
        len(values) > 1 or len(values[0]) > MAX_PARAMETER for values in found.values()
    ):
        raise BadRequest("The answer of the other site is not valid", fix="start again")
    return {name: values[0] for name, values in found.items()}


def _failed(name: str, error: DispatcherError, target: str) -> Response:
    """Say why; never begin again by itself: the same failure would repeat without end."""
    if not responses.for_people():
        return responses.problem(error)
    methods = context.portal().methods.get(context.portal().client)
    site = next((site for site in methods.sites if site.name == name), None)
    if site is None:
        raise NotFound("Page not found", fix="sign in again")
    person = None
    with suppress(DispatcherError):  # after Back, the page that comes back is one of a sign-in that succeeded
        person = context.person()
    values = {"site": site, "target": target, "methods": methods, "person": person}
    return responses.page("site_failed.html", error.status, error=error, **values)
