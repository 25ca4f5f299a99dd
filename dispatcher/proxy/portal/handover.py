"""Transfers a sign-in to an agent's own host (subdomain routing).

AGENT host: `begin` puts a random nonce into a cookie of that host and asks the portal's host for a code.
PORTAL host: the signed-in user gets a code for that host, bound to the nonce's hash, single use, 30 seconds.
AGENT host: `redeem` exchanges code and nonce for a session of that host only.  A link sent to another
person is not valid without the nonce, which neither pages nor other hosts can read.
"""

from __future__ import annotations

import re
from urllib.parse import urlencode

from flask import Blueprint, Response, request

from dispatcher.plugin.errors import BadRequest, DispatcherError, Forbidden, NotFound
from dispatcher.proxy.portal import context, csrf, redirect_targets, responses

pages = Blueprint("handover", __name__)
NONCE_AGE = 600  # seconds
_SHA256 = re.compile(r"[0-9a-f]{64}")


def begin(target: str) -> Response:
    """Send the browser from an agent's host to the portal's for a code."""
    if not responses.for_people():
        raise context.NotSignedIn("You are not signed in", fix=f"sign in at {context.login_url()}")
    if not redirect_targets.agent_host(request.host, context.portal().public_host):
        return context.go(context.portal().public_origin + context.local("/login"))
    nonce = _nonce() or csrf.new_seed()  # two tabs that begin at once share one
    query = urlencode({"host": request.host.lower(), "nonce": context.sha256(nonce), "next": target})
    response = context.go(f"{context.portal().public_origin}{context.local('/handover')}?{query}")
    context.set_cookie(response, context.portal().cookies.nonce, nonce, NONCE_AGE)
    return response


@pages.get("/handover")
def issue() -> Response:
    """Create a code for a host of one of the user's agents."""
    portal = context.portal()
    if not portal.subdomains or context.on_agent_host():
        raise NotFound("Page not found")
    host = redirect_targets.agent_host(request.args.get("host", ""), portal.public_host)
    nonce = request.args.get("nonce", "")
    if not host or not _SHA256.fullmatch(nonce):
        raise BadRequest("This link is incomplete", fix="open the app from your list of apps")
    someone = context.signed_in()
    code = portal.client.handover(someone.sha256, host, nonce)["code"]
    target = redirect_targets.own_path(request.args.get("next"), portal.prefix)
    scheme = portal.public_origin.partition("://")[0]
    query = urlencode({"code": code, "next": target})
    return context.go(f"{scheme}://{host}{context.local('/handover/redeem')}?{query}")


@pages.get("/handover/redeem")
def redeem() -> Response:
    """Exchange the code for a session of this host."""
    if not context.on_agent_host():
        raise NotFound("Page not found")
    target = redirect_targets.own_path(request.args.get("next"), context.portal().prefix)
    nonce = _nonce()
    try:
        if not nonce:
            raise Forbidden(
                "This sign-in did not begin in this browser", why="the browser has no nonce of this host"
            )
        answer = context.portal().client.redeem(request.args.get("code", "")[:256], nonce, request.host.lower())
    except (Forbidden, NotFound, BadRequest) as error:
        return _not_redeemed(error, target)
    response = context.go(target)
    context.set_session(response, answer["token"], answer["session"])
    context.set_cookie(response, context.portal().cookies.nonce, "", 0)
    return response


def _nonce() -> str:
    return context.only_cookie(context.portal().cookies.nonce, csrf.SEED)


def _not_redeemed(error: DispatcherError, target: str) -> Response:
    if context.person() is not None:  # another tab was first
        return context.go(target)
    if not responses.for_people():
        return responses.problem(error, 403)
    # Never automatically: the same failure would repeat without end.
    return responses.page("again.html", 403, error=error, target=target)
