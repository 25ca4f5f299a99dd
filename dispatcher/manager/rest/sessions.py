"""Sessions as the two roles see them."""

from __future__ import annotations

from collections.abc import Iterable

from dispatcher.manager.agents.agent import AgentView, iso
from dispatcher.manager.auth.sessions import ID_LENGTH
from dispatcher.manager.rest.routing import Json
from dispatcher.manager.rest.services import Services
from dispatcher.manager.storage.auth import SessionRow, Visitor


def agents_of(services: Services, row: SessionRow) -> list[AgentView]:
    """Return the agents that a session is for: those of its user, or the one of its host."""
    views = services.supervisor.queries.views(user=row.user)
    return [view for view in views if not row.parent or view.name == row.agent]


def session_json(services: Services, row: SessionRow) -> Json:
    """Return SESSION of the role *proxy*."""
    found: Json = {
        "sha256": row.sha256,
        "user": row.user,
        "agent": row.agent,
        "agents": [view.name for view in agents_of(services, row)],
        "ttl": round(services.sessions.ttl(row), 3),
        "lifetime": round(services.sessions.lifetime(row), 3),
        "created": iso(row.created),
    }
    if row.parent:
        found |= {"parent": row.parent, "host": row.host}
    return found


def listed(services: Services, rows: Iterable[SessionRow]) -> Json:
    """Return sessions, the last used first, without child sessions: they end with their parent."""
    parents = sorted((row for row in rows if not row.parent), key=lambda row: -row.last_used)
    visitors = services.sessions.visitors(parents)
    return {
        "sessions": [
            {
                "id": row.sha256[:ID_LENGTH],
                "user": row.user,
                "agent": row.agent,
                "created": iso(row.created),
                "last_used": iso(row.last_used),
                "expires": iso(services.sessions.expires(row)),
                "address": visitors.get(row.sha256, Visitor()).address,
                "user_agent": visitors.get(row.sha256, Visitor()).user_agent,
            }
            for row in parents
        ]
    }
