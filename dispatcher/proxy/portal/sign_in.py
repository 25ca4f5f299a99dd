"""Signing in and out.  The password is passed to the manager and never stored or logged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from flask import Blueprint, Response, request

from dispatcher.plugin.errors import (
    BadRequest,
    DeadlineExceeded,
    DispatcherError,
    Forbidden,
    NotFound,
    TooManyRequests,
)
from dispatcher.proxy.portal import context, handover, redirect_targets, responses

pages = Blueprint("sign_in", __name__)

_DEVICE_AGE = 180 * 86400  # seconds
#: What a page that was reached by a redirect may say; nothing else from the address is ever shown as a message.
NOTICES = {
    "signed-out": "You are signed out.",
    "everywhere": "You are signed out on all your devices.",
}


@pages.get("/login")
def form() -> Response:
    """Show the sign-in form; on an agent's own host begin the hand-over instead."""
    target = redirect_targets.own_path(request.args.get("next"), context.portal().prefix)
    if context.on_agent_host():
        return handover.begin(target)
    if responses.for_programs():
        fields = {"user": "string", "password": "string"}
        methods = context.portal().methods.get(context.portal().client)
        sites = [{"title": site.title, "url": context.local(f"/start/{site.name}")} for site in methods.sites]
        by_password = {"method": "POST", "content_type": "application/json", "fields": fields}
        return responses.data({"sign_in": by_password if methods.passwords else None, "sites": sites})
    notice, someone = NOTICES.get(request.args.get("notice", ""), ""), context.person()
    methods = context.portal().methods.get(context.portal().client)
    if methods.only and not notice and not someone and responses.for_people():
        return context.go(context.local(f"/start/{methods.only.name}", next=target))
    return _form(target, notice=notice, signed_in=someone)


@pages.post("/login")
def sign_in() -> Response:
    """Check name and password, and begin a new session, independent of any cookie."""
    if context.on_agent_host():
        raise Forbidden("There is no sign-in on the host of an app", fix=f"sign in at {context.login_url()}")
    target = redirect_targets.own_path(context.sent("next", redirect_targets.MAX_TARGET), context.portal().prefix)
    user = context.sent("user")
    try:
        context.check_form("login", session=False)
    except context.StaleForm as error:
        return _again(error, user, target)
    try:
        answer = _login(user, context.sent("password"))
    except (BadRequest, Forbidden):
        # Unknown names, invalid names and wrong passwords get the same answer.
        return _again(Forbidden("Name and password do not match", fix="check both and try again"), user, target)
    except TooManyRequests as error:
        return _again(error, user, target)
    return enter(answer, target)


def enter(answer: dict[str, Any], target: str) -> Response:
    """Return the response to a sign-in: give the browser its session; the one that it had ends.

    :param answer: of the manager; :param target: where the browser goes.
    """
    if before := context.session_digest():
        with suppress(DispatcherError):
            context.portal().client.logout(before)
    token, session, device = (answer[name] for name in ("token", "session", "device"))
    other = context.is_other_person(device)
    if other and context.device_token() and responses.for_people():
        # What the previous user's pages sent with the session's cookie would arrive at this user's app.
        proof = context.form_token(_purpose(token), session=False)
        response = context.go(context.local("/welcome", next=target, proof=proof))
        context.set_cookie(response, context.portal().cookies.session, "", 0)
        context.set_cookie(response, context.portal().cookies.nonce, token, handover.NONCE_AGE)
    else:
        response = _welcome(session, target)
        context.set_session(response, token, session)
    if other:
        context.forget_apps(response)
    context.set_cookie(response, context.portal().cookies.device, device, _DEVICE_AGE)
    return response


@pages.get("/welcome")
def replace_pages() -> Response:
    """Replace the open pages of the previous user of this browser."""
    target = redirect_targets.own_path(request.args.get("next"), context.portal().prefix)
    if not context.only_cookie(context.portal().cookies.nonce, context.TOKEN):
        return context.go(target)
    values: dict[str, Any] = {"agent": "", "before": "other people's apps", "after": "your app", "target": target}
    values["proof"] = request.args.get("proof", "")
    return responses.page("others.html", heading="Somebody else used this browser before", **values)


@pages.post("/welcome")
def welcome() -> Response:
    """Set the session's cookie, now that the pages are replaced."""
    token = context.only_cookie(context.portal().cookies.nonce, context.TOKEN)
    context.check_form(_purpose(token), session=False)
    response = context.go(
        redirect_targets.own_path(context.sent("next", redirect_targets.MAX_TARGET), context.portal().prefix)
    )
    with suppress(NotFound):  # too late, or sent twice: the target leads to the sign-in
        context.set_session(response, token, context.portal().client.lookup(context.sha256(token)))
    context.set_cookie(response, context.portal().cookies.nonce, "", 0)
    return response


def _purpose(token: str) -> str:
    """Bind the form to a session: a page of an app could plant the cookie of another."""
    return f"welcome {context.sha256(token)}"


def _login(user: str, password: str) -> dict[str, Any]:
    """Begin a session.

    :raises Forbidden, BadRequest: wrong name or password; :raises TooManyRequests: throttled, or too many at once.
    """
    portal = context.portal()
    agent = request.headers.get("User-Agent", "")[:512]
    with slot(portal.logins):
        return portal.login_client.login(user, password, context.address(), agent, context.device_token())


@contextmanager
def slot(slots: context.LoginSlots) -> Iterator[None]:
    """Reserve threads for other requests while many users sign in.

    :raises TooManyRequests: all slots are taken, or those of the address, or the manager did not answer in time.
    """
    address = context.address()
    busy = TooManyRequests("Too many sign-ins at once", fix="try again in a moment", retry_after=2)
    if not slots.take(address):
        raise busy
    try:
        yield
    except DeadlineExceeded as error:  # it was waited for as long as makes sense
        raise busy from error
    finally:
        slots.give_back(address)


def _welcome(session: dict[str, Any], target: str) -> Response:
    if responses.for_programs():
        shown = {name: session.get(name) for name in ("user", "agent", "agents", "ttl")}
        return responses.data({**shown, "next": target})
    return context.go(target)


def _again(error: DispatcherError, user: str, target: str) -> Response:
    """Show the form once more, with the reason."""
    if not responses.for_people():
        return responses.problem(error)
    return _form(target, error.status, user=user[:255], error=error)


def _form(target: str, status: int = 200, **values: Any) -> Response:
    methods = context.portal().methods.get(context.portal().client)
    return responses.page("login.html", status, target=target, methods=methods, **values)


@pages.get("/logout")
def ask() -> Response:
    """Ask for confirmation; a link or an image on another page must not sign a user out."""
    if context.on_agent_host():
        return context.go(context.portal().public_origin + context.local("/logout"))
    someone = context.person()
    if someone is None and responses.for_people():
        return context.go(context.local("/login"))
    return responses.page("logout.html", someone=context.signed_in())


@pages.post("/logout")
def sign_out() -> Response:
    """End the session, close its connections and clear the browser's data."""
    context.check_form("logout")
    return end_session("signed-out")


def end_session(notice: str) -> Response:
    """End the session here, and at the site where the user signed in; return the response."""
    digest, url = context.session_digest(), None
    if digest:
        client = context.portal().client
        try:
            url = client.sign_out(digest)["url"]
        except NotFound:  # of an earlier manager
            client.logout(digest)
    if not responses.for_people():
        response = responses.data({"signed_out": True} | ({"url": url} if url else {}))
    elif url:
        # No redirect: browsers would apply the form's policy (`form-action`) to it.
        response = responses.page("leaving.html", url=url, host=urlsplit(url).hostname)
    else:
        response = context.go(context.local("/login", notice=notice))
    context.forget_session(response)
    return response


@pages.get("/signed-out")
def signed_out() -> Response:
    """Receive the browser when its session at the site has ended, too."""
    return context.go(context.local("/login", notice="signed-out"))
