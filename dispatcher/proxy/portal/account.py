"""A user's account: password and sessions.  A change of the password requires the old one."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from flask import Blueprint, Response, request

from dispatcher.common import humanize
from dispatcher.plugin.errors import BadRequest, Forbidden, NotFound, TooManyRequests, Unsupported
from dispatcher.proxy.portal import context, responses, sign_in, words

pages = Blueprint("account", __name__)

NOTICES = {
    "password": "Your password is changed. All your other sessions have ended.",
    "revoked": "That session has ended.",
}


@pages.get("/account")
def account() -> Response:
    """Show the account."""
    if context.on_agent_host():
        return context.go(context.portal().public_origin + context.local("/account"))
    return _page(notice=NOTICES.get(request.args.get("notice", ""), ""))


def _page(status: int = 200, **values: Any) -> Response:
    someone = context.signed_in()
    found = context.portal().client.my_sessions(someone.sha256)
    sessions, changes = found["sessions"], found.get("changes_passwords", True)  # missing: of an earlier manager
    if responses.for_programs():
        return responses.data({"user": someone.user, "sessions": sessions, "changes_passwords": changes})
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
    values |= {"someone": someone, "sessions": shown, "changes_passwords": changes}
    return responses.page("account.html", status, **values)


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
            someone.sha256, context.sent("password"), new, context.address()
        )
    except (BadRequest, Forbidden, TooManyRequests, Unsupported) as error:
        if not responses.for_people():
            return responses.problem(error)
        return _page(error.status, error=error)
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


def _back(notice: str) -> Response:
    return context.go(context.local("/account", notice=notice))
