"""Why an agent is in its state: short sentences for `dispatcher why` and for an operator at night.  Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from dispatcher.common.humanize import duration
from dispatcher.config.schema import AppDefaults
from dispatcher.manager.agents.agent import AgentView
from dispatcher.manager.agents.idle import idle_action
from dispatcher.manager.agents.lifecycle import EventKind, State
from dispatcher.manager.agents.restarts import recent
from dispatcher.manager.files.quota import DiskUse
from dispatcher.manager.storage.rows import AgentRow, Desired, Pending
from dispatcher.plugin.model import AgentEvent, App, Capability, Finding, Isolation

_IS = {
    State.STOPPED: "is stopped",
    State.STARTING: "is starting",
    State.RUNNING: "runs and is ready",
    State.SUSPENDING: "is being suspended",
    State.SUSPENDED: "is suspended: its memory is kept, it does not execute",
    State.HIBERNATED: "is hibernated: its memory is kept on disk",
    State.STOPPING: "is being stopped",
    State.FAILED: "has failed",
    State.UNKNOWN: "is in an unknown state",
    State.REMOVING: "is being removed",
}

#: With what sentences about an app's output, and its lines, begin.
OUTPUT = ("Its last lines were:", "    ")


def explain(
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
    disk: DiskUse | None,
) -> list[str]:
    """Return the state of an agent, since when, why, the last failure, and what happens next.

    :param configured: its app is in the configuration; :param backend_since: since when the backend answers, or
        does not; :param stuck: a provider's call for it hangs; :param events: its last ones;
        :param disk: what its data takes.
    """
    found = [f"{view.name} {_IS[view.state]}, since {_time(view.since)} ({duration(now - view.since)})."]
    found.append(f"It is an agent of {view.user}, app {view.app}, on the provider {view.provider}.")
    found.append(f"Desired state: {row.desired.value}." + _pending(row))
    if row.operation is not None and row.operation_since is not None:
        stage = (
            f", at the step “{view.stage}”" + (f" ({view.detail})" if view.detail else "") if view.stage else ""
        )
        found.append(f"In progress for {duration(now - row.operation_since)}: {row.operation.value}{stage}.")
    if not view.reachable:
        since = f" since {_time(backend_since)}" if backend_since else ""
        found.append(f"The backend of {view.provider} does not answer{since}: {backend_problem}.")
        found.append("The last observed state is kept and requests are still routed; the backend is called again.")
    if disk and disk.full:
        found.append(
            f"Its data is full ({disk}): writes fail until files are deleted, or `disk` is raised and the agent "
            "restarted."
        )
    found += _failure(row, now, policy, stuck=stuck)
    found += _last(row, events)
    if not configured:
        found.append(
            f"The app {view.app} is no longer configured: its agents can be stopped, not started.  "
            f"`dispatcher add {view.user} --app APP` adds an agent of another app, "
            f"`dispatcher remove {view.name}` removes this one."
        )
    elif view.outdated:
        found.append(
            f"It runs with an earlier configuration; `dispatcher restart {view.name}` applies the present one."
        )
    if row.move is not None:
        found.append(f"Its data moves from {row.move.source} to {row.move.target}, at the step “{row.move.step}”.")
    found += _next(view, now, policy, capabilities)
    return found


def unlimited(apps: Sequence[App], isolation: Isolation, capabilities: frozenset[Capability]) -> Iterator[Finding]:
    """Say which resources of the host one agent of these apps can use up."""
    bounds = {"disk": ("the disk", Capability.DISK_LIMIT)}
    if isolation < Isolation.VM:  # a machine has a memory and processes of its own
        bounds["memory"] = ("the memory", Capability.MEMORY_LIMIT)
        bounds["pids"] = ("the processes", Capability.PIDS_LIMIT)
    for key, (what, capability) in bounds.items():
        if names := [app.name for app in apps if getattr(app.limits, key) is None]:
            instead = "another provider, or project quotas (docs/howto/limit-disk-space.md)"
            instead = f"use {instead if key == 'disk' else 'another provider'}"
            yield Finding.warning(
                f"{', '.join(names)}: `{key}` is unlimited: one agent can use up {what} of the host",
                f"set `{key}`" if capability in capabilities else instead,
            )


def _pending(row: AgentRow) -> str:
    if row.pending is Pending.RESTART:
        return "  A restart is in progress."
    return "  Its data is deleted first." if row.pending is Pending.RESET else ""


def _failure(row: AgentRow, now: float, policy: AppDefaults, *, stuck: bool) -> list[str]:
    failure = row.failure
    if failure is None:
        return []
    found = [f"At {_time(failure.time)}: {failure.what}" + (f", because: {failure.why}." if failure.why else ".")]
    found += [f"What to do: {failure.fix}."] if failure.fix else []
    found += [OUTPUT[0], *(f"{OUTPUT[1]}{line}" for line in failure.log)] if failure.log else []
    tries = len(recent(row.attempts, now))
    if stuck:
        found.append("No operation begins until the provider's call returns.")
    elif failure.final:
        found.append("It is not retried automatically, as it would fail in the same way.")
    elif row.retry_at is not None:
        found.append(f"The next try is in {duration(max(0.0, row.retry_at - now))} ({tries} so far).")
    else:
        found.append(
            f"The manager gave up after {tries} tries within ten minutes (max_restarts = {policy.max_restarts}); "
            f"`dispatcher start {row.name}` tries again."
        )
    return found


def _last(row: AgentRow, events: Sequence[AgentEvent]) -> list[str]:
    found = []
    for event in reversed(events):
        ended = event.kind == EventKind.DIED
        if ended or (event.kind == EventKind.FAILED and row.failure is None):
            verb = "exited" if ended else "failed"
            found.append(f"It last {verb} at {_time(event.time)}: {event.detail or 'reason unknown'}.")
            break
    for event in reversed(events):
        if event.kind == EventKind.STARTING:
            break
        if event.kind == EventKind.OUT_OF_MEMORY:
            found.append(f"At {_time(event.time)} {event.detail}.")
            found.append(f"What to do: raise `memory` of the app {row.app}, or use less at once.")
            break
    for event in reversed(events):
        if event.kind in {EventKind.STOPPED, EventKind.SUSPENDED, EventKind.HIBERNATED}:
            if event.detail and row.desired is not Desired.RUNNING:
                found.append(f"It was {event.kind} at {_time(event.time)}, because {event.detail}.")
            break
    return found


def _next(view: AgentView, now: float, policy: AppDefaults, capabilities: frozenset[Capability]) -> list[str]:
    used = (
        "It has not been used yet." if view.last_used is None else f"It was last used at {_time(view.last_used)}."
    )
    if view.state is State.RUNNING:
        if policy.idle_timeout is False:
            return [used, "It has no idle timeout."]
        at = max(view.last_used or 0.0, view.since) + policy.idle_timeout
        action = idle_action(policy, capabilities).value
        return [used, f"If it is not used, it will be {action} in about {duration(max(0.0, at - now))}."]
    if view.state in {State.SUSPENDED, State.HIBERNATED}:
        found = [used, "The next request wakes it."]
        if policy.idle_stop is not False:
            left = max(0.0, view.since + policy.idle_stop - now)
            found.append(f"Without a request it is stopped in {duration(left)}.")
        return found
    if view.state is State.STOPPED:
        if policy.credentials == "stdin":
            return ["It starts at its user's next sign-in."]
        return ["The next request, or its user's next sign-in, starts it."]
    return []


def _time(time: float) -> str:
    return datetime.fromtimestamp(time).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
