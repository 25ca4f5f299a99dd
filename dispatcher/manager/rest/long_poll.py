"""Requests that wait until an agent has reached a state (`?wait=SECONDS`)."""

from __future__ import annotations

from collections.abc import Callable

from dispatcher.manager.agents.agent import AgentView
from dispatcher.manager.agents.lifecycle import State
from dispatcher.manager.rest.services import Services
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Conflict, DispatcherError, NotFound, StartFailed, Unavailable

UNKNOWN = 15.0  # seconds for which the state of an agent may be unknown
_SLICE = 1.0  # seconds between two looks at whether the manager is closing

#: The states that satisfy a request.  An agent that has ended cannot be suspended any more: that counts, too.
_TARGETS = {
    "running": {State.RUNNING},
    "suspended": {State.SUSPENDED, State.HIBERNATED, State.STOPPED},
    "hibernated": {State.HIBERNATED, State.STOPPED},
    "stopped": {State.STOPPED},
    "absent": set[State](),
}


def wait_until(
    services: Services, agent: str, done: Callable[[AgentView | None], bool], seconds: float
) -> AgentView | None:
    """Return an agent's view once `done` is true of it, or after `seconds`, or at once if too many requests wait.

    None: the agent is gone.
    """
    deadline = Deadline(seconds)
    if not seconds or not services.waiting.acquire(blocking=False):
        return view_or_none(services, agent)
    try:
        while True:
            try:
                view = services.supervisor.queries.wait(agent, done, min(_SLICE, deadline.remaining()))
            except NotFound:
                view = None
            if done(view) or deadline.expired or services.closing.is_set():
                return view
    finally:
        services.waiting.release()


def wait_for_state(services: Services, agent: str, desired: str, seconds: float) -> tuple[AgentView, bool]:
    """Wait until an agent has the desired state, has failed, or another state is desired.

    :return: the last view, and whether the state was reached.
    :raises NotFound: the agent is gone; :raises Conflict: another state was requested meanwhile.
    :raises StartFailed: it failed, with the reason and its last lines.
    :raises Unavailable: its state has been unknown for a while, as its backend does not answer.
    """
    patience = Deadline(UNKNOWN)

    def unknown(view: AgentView) -> bool:
        if view.state is not State.UNKNOWN:
            patience.at = Deadline(UNKNOWN).at
        return patience.expired

    def ended(view: AgentView | None) -> bool:
        if view is not None and unknown(view):
            return True
        return view is None or view.desired.value != desired or view.state in _TARGETS[desired] | {State.FAILED}

    view = wait_until(services, agent, ended, seconds)
    if view is None:
        raise NotFound(f"The agent {agent} no longer exists", why="it was removed meanwhile")
    if view.desired.value != desired:
        raise Conflict(
            f"The desired state of {agent} is {view.desired.value} now", why="another request set it meanwhile"
        )
    if unknown(view):
        raise Unavailable(
            f"The state of {agent} is unknown",
            why=f"the backend of the provider {view.provider} does not answer; the manager continues when it does",
            fix=f"see `dispatcher why {agent}` and `dispatcher providers check {view.provider}`",
        )
    if view.state is State.FAILED and desired != "absent":
        raise _failure(view)
    return view, view.state in _TARGETS[desired]


def view_or_none(services: Services, agent: str) -> AgentView | None:
    """Return an agent's view; None when there is no such agent."""
    try:
        return services.supervisor.queries.view(agent)
    except NotFound:
        return None


def _failure(view: AgentView) -> DispatcherError:
    found = view.failure
    if found is None:
        return StartFailed(f"{view.name} failed", fix=f"see: dispatcher why {view.name}")
    return StartFailed(found.what, why=found.why, fix=found.fix, details={"log": list(found.log)})
