"""Why an agent is in its state: plain sentences for somebody who is woken at three in the morning.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from dispatcher.config.load import AppDefaults
from dispatcher.manager.agents.idle import idle_action, words
from dispatcher.manager.agents.lifecycle import Desired, Pending, State, recent
from dispatcher.manager.agents.views import AgentView
from dispatcher.manager.storage.agents import AgentRow
from dispatcher.plugin.model import AgentEvent, Capability

_IS = {
    State.STOPPED: "is stopped",
    State.STARTING: "is starting",
    State.RUNNING: "runs and is ready",
    State.SUSPENDING: "is being put to sleep",
    State.SUSPENDED: "is suspended: its memory is kept, it does not execute",
    State.HIBERNATED: "is hibernated: its memory is kept on disk",
    State.STOPPING: "is being stopped",
    State.FAILED: "has failed",
    State.UNKNOWN: "is in an unknown state",
    State.REMOVING: "is being removed",
}
_WANTED = {
    Desired.RUNNING: "run",
    Desired.SUSPENDED: "be suspended",
    Desired.HIBERNATED: "be hibernated",
    Desired.STOPPED: "be stopped",
    Desired.ABSENT: "be removed",
}


def sentences(
    row: AgentRow,
    view: AgentView,
    *,
    now: float,
    policy: AppDefaults,
    configured: bool,
    capabilities: frozenset[Capability],
    backend_since: float | None,
    backend_problem: str,
    stuck: bool,
    events: Sequence[AgentEvent],
) -> list[str]:
    """Return what an agent is, since when, why, what failed last, and what happens next.

    :param configured: its app is in the configuration; :param backend_since: since when the backend answers, or
        does not; :param stuck: a provider's call for it hangs; :param events: its last ones.
    """
    told = [f"{view.name} {_IS[view.state]}, since {_time(view.since)} ({words(now - view.since)})."]
    told.append(f"It is an agent of {view.user}, app {view.app}, on the provider {view.provider}.")
    told.append(f"It shall {_WANTED[row.desired]}." + _pending(row))
    if row.operation is not None and row.operation_since is not None:
        stage = (
            f", at the step “{view.stage}”" + (f" ({view.detail})" if view.detail else "") if view.stage else ""
        )
        told.append(f"In progress for {words(now - row.operation_since)}: {row.operation.value}{stage}.")
    if not view.reachable:
        since = f" since {_time(backend_since)}" if backend_since else ""
        told.append(f"The backend of {view.provider} cannot be asked{since}: {backend_problem}.")
        told.append("What was last seen is kept, requests go on to where they went; it is asked again regularly.")
    told += _failure(row, now, policy, stuck=stuck)
    told += _last(row, events)
    if not configured:
        told.append(f"The app {view.app} is no longer in the configuration: it can be stopped, not started again.")
    elif view.outdated:
        told.append(f"It runs as it was configured earlier; `dispatcher restart {view.name}` renews it.")
    if row.move is not None:
        told.append(f"Its data moves from {row.move.source} to {row.move.target}, at the step “{row.move.step}”.")
    told += _next(view, now, policy, capabilities)
    return told


def _pending(row: AgentRow) -> str:
    if row.pending is Pending.RESTART:
        return "  It is being restarted."
    return "  Its data is to be deleted before that." if row.pending is Pending.RESET else ""


def _failure(row: AgentRow, now: float, policy: AppDefaults, *, stuck: bool) -> list[str]:
    failure = row.failure
    if failure is None:
        return []
    told = [f"At {_time(failure.time)}: {failure.what}" + (f", because: {failure.why}." if failure.why else ".")]
    told += [f"What to do: {failure.fix}."] if failure.fix else []
    told += ["Its last lines were:", *(f"    {line}" for line in failure.log)] if failure.log else []
    tries = len(recent(row.attempts, now))
    if stuck:
        told.append("Nothing is done with it until the provider's call returns.")
    elif failure.final:
        told.append("It is not tried again by itself, as that would fail in the same way.")
    elif row.retry_at is not None:
        told.append(f"It is tried again in {words(max(0.0, row.retry_at - now))} ({tries} tries so far).")
    else:
        told.append(
            f"It was given up after {tries} tries within ten minutes (max_restarts = {policy.max_restarts}); "
            f"`dispatcher start {row.name}` tries again."
        )
    return told


def _last(row: AgentRow, events: Sequence[AgentEvent]) -> list[str]:
    told = []
    for event in reversed(events):
        if event.kind in {"died", "failed"} and (row.failure is None or event.kind == "died"):
            told.append(f"It last {event.kind} at {_time(event.time)}: {event.detail or 'no reason is known'}.")
            break
    for event in reversed(events):
        if event.kind in {"stopped", "suspended", "hibernated"}:
            if event.detail and row.desired is not Desired.RUNNING:
                told.append(f"It was {event.kind} at {_time(event.time)}, because {event.detail}.")
            break
    return told


def _next(view: AgentView, now: float, policy: AppDefaults, capabilities: frozenset[Capability]) -> list[str]:
    used = "Nobody has used it yet." if view.last_used is None else f"It was last used at {_time(view.last_used)}."
    if view.state is State.RUNNING:
        if policy.idle_timeout is False:
            return [used, "It is not put to sleep however long nobody uses it."]
        at = max(view.last_used or 0.0, view.since) + policy.idle_timeout
        action = idle_action(policy, capabilities).value
        return [used, f"If nobody uses it, it will be {action} in about {words(max(0.0, at - now))}."]
    if view.state in {State.SUSPENDED, State.HIBERNATED}:
        told = [used, "The next request wakes it."]
        if policy.idle_stop is not False:
            told.append(f"If none comes, it is stopped in {words(max(0.0, view.since + policy.idle_stop - now))}.")
        return told
    if view.state is State.STOPPED:
        if policy.credentials == "stdin":
            return ["It starts at its user's next sign-in."]
        return ["The next request, or its user's next sign-in, starts it."]
    return []


def _time(time: float) -> str:
    return datetime.fromtimestamp(time).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
