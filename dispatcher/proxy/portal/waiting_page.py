"""The waiting page, shown in place of an app that is not ready.

The edge requests it under the app's own address; two header fields (which clients cannot send) name the agent and
the path.  Never cached, 503, HTML for browsers and JSON for programs.  The page follows the start by the edge's
event stream, by polling the status if that breaks, and by reloading without scripts.  The modules
through which progress reaches it are listed in docs/explanation/lifecycle.md.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, request

from dispatcher.common import humanize
from dispatcher.common.log import logger
from dispatcher.plugin.errors import StartFailed, Unavailable
from dispatcher.proxy.portal import context, redirect_targets, responses, words

pages = Blueprint("waiting", __name__)
REFRESH = 2  # seconds
RETRY_FAILED = 30  # seconds

_log = logger("portal")


@pages.get("/waiting")
def waiting() -> Response:
    """Show the progress of the start, or that it failed."""
    target = redirect_targets.own_path(
        _header("X-Dispatcher-Target") or request.args.get("next"), context.portal().prefix
    )
    if responses.for_people() and context.person() is None:
        return context.go(context.local("/login", next=target))
    someone = context.signed_in()
    agent = context.agent_of(someone, _header("X-Dispatcher-Agent") or someone.agent)
    return _failed(agent, target) if agent["state"] == "failed" else _under_way(agent, target)


def _header(name: str) -> str:
    """Return a header of the edge: UTF-8, which WSGI passes as Latin-1."""
    return request.headers.get(name, "").encode("latin-1", "replace").decode("utf-8", "replace")


def _under_way(agent: dict[str, Any], target: str) -> Response:
    title = context.portal().title(agent["app"])
    label, _ = words.state(agent["state"])
    error = Unavailable(f"{title} is not ready", why=label.lower(), fix="try again soon", retry_after=REFRESH)
    if not responses.for_people():
        return responses.problem(error, 503, agent=words.public_agent(agent))
    asleep = agent["state"] in words.ASLEEP
    shown = {
        "agent": words.public_agent(agent),
        "title": title,
        "label": label,
        "target": target,
        "refresh": REFRESH,
        "asleep": asleep,
    }
    return responses.page("waiting.html", 503, error=error, **shown)


def _failed(agent: dict[str, Any], target: str) -> Response:
    """Say that the start failed; the reason is for operators: in the log, in `dispatcher why`, in REST."""
    failure = agent.get("failure") or {}
    reason = {name: failure.get(name) for name in ("what", "why", "fix")}
    _log.warning("a start has failed", agent=agent["name"], request_id=responses.request_id(), **reason)
    title = context.portal().title(agent["app"])
    error = StartFailed(f"{title} could not start", fix=responses.ask_administrator(), retry_after=RETRY_FAILED)
    if not responses.for_people():
        return responses.problem(error, 503, agent=words.public_agent(agent))
    since = humanize.ago(agent.get("since"))
    return responses.page("failed.html", 503, agent=agent, title=title, error=error, target=target, since=since)
