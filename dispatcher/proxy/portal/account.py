"""A user's account: password, sessions, API tokens.  A new password and a new token require the present one."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from flask import Blueprint, Response, request

from dispatcher.common import humanize
from dispatcher.plugin.errors import BadRequest, Conflict, Forbidden, NotFound, TooManyRequests, Unsupported
from dispatcher.proxy.portal import context, responses, sign_in, words

pages = Blueprint("account", __name__)

NOTICES = {
    "password": "Your password is changed. All your other sessions have ended.",
    "revoked": "That session has ended.",
    "token-revoked": "That token is revoked. Programs can no longer use it.",
}
#: For how long a token can be valid, and what the page calls it; the first is the default.
EXPIRIES = {"90d": "90 days", "7d": "7 days", "30d": "30 days", "365d": "1 year", "never": "Until I revoke it"}


@pages.get("/account")
def account() -> Response:
    """Show the account."""
    if context.on_agent_host():
        return context.go(context.portal().public_origin + context.local("/account"))
    return _page(notice=NOTICES.get(request.args.get("notice", ""), ""))


def _page(status: int = 200, **values: Any) -> Response:
    someone = context.signed_in()
    found = context.portal().client.my_sessions(someone.sha256)
    # An earlier manager leaves some members out.
    sessions, changes, tokens = found["sessions"], found.get("changes_passwords", True), found.get("tokens")
    if responses.for_programs():
        return responses.data(
            {"user": someone.user, "sessions": sessions, "changes_passwords": changes, "tokens": tokens or []}
        )
    shown = [
        {
            "id": session["id"],
            "browser": words.browser(session.get("user_agent")),
            "address": session.get("address") or "",
            "created": humanize.ago(session["created"]),
            "last_used": humanize.ago(session["last_used"]),
            "own": someone.sha256.startswith(session["id"]),
        }
        for session in sessions
    ]
    shown.sort(key=lambda session: not session["own"])
    values |= {
        "someone": someone,
        "sessions": shown,
        "changes_passwords": changes,
        "tokens": None if tokens is None else [_shown(token) for token in tokens],
        "tokens_need_password": found.get("tokens_need_password", True),
        "expiries": EXPIRIES,
    }
    return responses.page("account.html", status, **values)


def _shown(token: dict[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a token."""
    expires = token["expires"]
    return {
        "id": token["id"],
        "note": token["note"] or "Without a note",
        "scopes": " ".join(token["scopes"]),
        "created": humanize.ago(token["created"]),
        "expires": f"expires {humanize.ago(expires)}" if expires else "never expires",
        "last_used": f"used {humanize.ago(token['last_used'])}" if token["last_used"] else "never used",
    }


@pages.post("/account/password")
def change_password() -> Response:
    """Change the password; other sessions end, this one gets a new token."""
    context.check_form("account")
    someone = context.signed_in()
    new = context.sent("new_password")
    try:
        if not request.is_json and new != context.sent("again"):
            raise BadRequest("The two new passwords differ", fix="type the same new password twice")
        answer = context.portal().login_client.change_password(
            someone.sha256,
            context.sent("password"),
            new,
            context.address(),
            revoke_tokens=context.sent("tokens") == "revoke",
        )
    except (BadRequest, Forbidden, TooManyRequests, Unsupported) as error:
        if not responses.for_people():
            return responses.problem(error)
        return _page(error.status, error=error, faulty="password")
    done = responses.data({"user": someone.user}) if responses.for_programs() else _back("password")
    context.set_session(done, answer["token"], answer["session"])
    return done


@pages.post("/account/sessions")
def revoke() -> Response:
    """End one other session of this user, or all of them."""
    context.check_form("account")
    someone = context.signed_in()
    client = context.portal().client
    which = context.sent("id")
    if which != "all":
        client.logout(someone.sha256, which)
        return responses.data({"revoked": 1}) if responses.for_programs() else _back("revoked")
    for session in client.my_sessions(someone.sha256)["sessions"]:
        if not someone.sha256.startswith(session["id"]):
            with suppress(NotFound):  # ended by itself meanwhile
                client.logout(someone.sha256, session["id"])
    return sign_in.end_session("everywhere")


@pages.get("/account/tokens")
def tokens() -> Response:
    """Lead back to the account from the address of a page with a new token."""
    return context.go(context.local("/account"))


@pages.post("/account/tokens")
def create_token() -> Response:
    """Create an API token and show it once: in this response, without a redirect, and nowhere else."""
    context.check_form("account")
    someone = context.signed_in()
    try:
        made = context.portal().login_client.create_my_token(
            someone.sha256,
            context.address(),
            password=context.sent("password") or None,
            expires=context.sent("expires") or None,
            note=_note(context.sent("note")),
        )
    except (BadRequest, Conflict, Forbidden, TooManyRequests) as error:
        if not responses.for_people():
            return responses.problem(error)
        return _page(error.status, error=error, faulty="token")
    return responses.data(made, 201) if responses.for_programs() else _page(created=made)


@pages.post("/account/tokens/revoke")
def revoke_token() -> Response:
    """Revoke an API token of this user."""
    context.check_form("account")
    context.portal().client.revoke_my_token(context.signed_in().sha256, context.sent("id"))
    return responses.data({"revoked": 1}) if responses.for_programs() else _back("token-revoked")


def _note(text: str) -> str:
    return " ".join(text.split())


def _back(notice: str) -> Response:
    return context.go(context.local("/account", notice=notice))
