"""Public snapshots of an agent, built from the stored row and the operation in flight.

`AgentView.to_json` is AGENT of the REST interface, `to_feed` AGENT of the feed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from dispatcher.manager.agents.agent import Operation
from dispatcher.manager.agents.lifecycle import FeedState, Situation, State, feed_state, public_state
from dispatcher.manager.backends.backend import Backend
from dispatcher.manager.storage.rows import AgentRow, Failure, Move
from dispatcher.manager.storage.states import Desired
from dispatcher.plugin import names
from dispatcher.plugin.model import Endpoint


def iso(time: float | None) -> str | None:
    """Return a Unix time as ISO 8601 with offset; None stays None."""
    return None if time is None else datetime.fromtimestamp(time, timezone.utc).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentView:
    """A snapshot; never changes.

    :ivar state: the public state; :ivar feed_state: the state in the feed.
    :ivar stage: of the operation in flight, "" without one; :ivar fraction: 0 to 1 if known.
    :ivar since: when `state` began; :ivar reachable: whether the backend answers; :ivar observed_at: when the
        agent was last observed.  Times are Unix seconds.
    :ivar endpoint: while the agent runs and is ready.
    :ivar owner_uid: host user id that must own a Unix endpoint's socket; None: not checked.
    :ivar label: the agent's DNS label.
    """

    name: str
    user: str
    app: str
    provider: str
    state: State
    desired: Desired
    feed_state: FeedState
    label: str
    stage: str = ""
    detail: str = ""
    fraction: float | None = None
    since: float
    failure: Failure | None = None
    outdated: bool = False
    last_used: float | None = None
    created: float
    reachable: bool = True
    observed_at: float | None = None
    move: Move | None = None
    endpoint: Endpoint | None = None
    owner_uid: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return AGENT of the REST interface."""
        return {
            "name": self.name,
            "user": self.user,
            "app": self.app,
            "provider": self.provider,
            "state": self.state.value,
            "desired": self.desired.value,
            "stage": self.stage,
            "detail": self.detail,
            "fraction": self.fraction,
            "since": iso(self.since),
            "failure": self.failure.to_json() if self.failure else None,
            "outdated": self.outdated,
            "last_used": iso(self.last_used),
            "created": iso(self.created),
            "reachable": self.reachable,
            "observed_at": iso(self.observed_at),
            "move": self.move
            and {
                "from": self.move.source,
                "to": self.move.target,
                "step": self.move.step,
                "since": iso(self.move.since),
            },
        }

    def to_feed(self) -> dict[str, Any]:
        """Return AGENT of the feed.  `failed` is the failure in a sentence, or null."""
        return {
            "name": self.name,
            "user": self.user,
            "app": self.app,
            "label": self.label,
            "state": self.feed_state.value,
            "endpoint": str(self.endpoint) if self.endpoint else None,
            "uid": self.owner_uid,
            "stage": self.stage,
            "detail": self.detail,
            "fraction": self.fraction,
            "failed": self.failure.what if self.failure else None,
        }


def view_of(
    row: AgentRow,
    situation: Situation,
    operation: Operation | None,
    backend: Backend,
    *,
    outdated: bool,
    last_used: float | None,
    notice: str,
    now: float,
) -> AgentView:
    """Return an agent's view."""
    state = public_state(situation)
    detail = operation.detail if operation else ""
    if state is State.FAILED and row.retry_at is not None:
        detail = f"the next try is in {max(0, round(row.retry_at - now))} s"
    elif state is State.UNKNOWN:
        detail = str(backend.problem)
    elif state is State.RUNNING:
        detail = notice
    observed_at = row.observed_at
    if backend.last_contact is not None and situation.reachable and row.operation is None:
        observed_at = max(backend.last_contact, observed_at or 0.0)
    fed = feed_state(situation)
    return AgentView(
        name=row.name,
        user=row.user,
        app=row.app,
        provider=row.provider,
        state=state,
        desired=row.desired,
        feed_state=fed,
        label=names.key(row.name),
        stage=operation.stage if operation else "",
        detail=detail,
        fraction=operation.fraction if operation else None,
        since=row.since,
        failure=None if row.operation else row.failure,
        outdated=outdated,
        last_used=last_used,
        created=row.created,
        reachable=situation.reachable,
        observed_at=observed_at,
        move=row.move,
        endpoint=Endpoint.parse(row.endpoint) if fed is FeedState.RUNNING and row.endpoint else None,
        owner_uid=row.owner_uid,
    )
