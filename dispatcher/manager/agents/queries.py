"""Everything that can be read about agents and providers.  Changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from dispatcher.config.check import faults_of
from dispatcher.config.messages import did_you_mean
from dispatcher.manager.agents.agent import Agent, AgentView, iso
from dispatcher.manager.agents.explain import explain, unlimited
from dispatcher.manager.agents.lifecycle import ALIVE
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.backends.backend import Backend, Contact, collect_usage
from dispatcher.manager.backends.logs import NO_LINES, LogCollector
from dispatcher.manager.files.quota import DiskUse
from dispatcher.plugin.deadline import Deadline, boottime
from dispatcher.plugin.errors import DispatcherError, NotFound
from dispatcher.plugin.model import AgentEvent, Capability, Finding, Handle, Isolation, Level, Usage
from dispatcher.plugin.names import printable

CHECK = 10.0  # seconds
RECENT = 20  # events that an explanation takes into account


class Queries:
    """Answers queries, in the forms of the REST interface.  Agents are given by their names.

    :raises NotFound: (any query for one agent) there is no such agent.
    """

    def __init__(self, registry: Registry, logs: LogCollector) -> None:
        self._registry = registry
        self._logs = logs

    # --- views

    def view(self, name: str) -> AgentView:
        """Return a snapshot of an agent; never blocks."""
        return self._registry.view(self._registry.find(name))

    def measured(self, name: str) -> AgentView:
        """Return a snapshot with what the data takes now."""
        self._registry.measure(self._registry.find(name))
        return self.view(name)

    def views(self, *, user: str | None = None) -> list[AgentView]:
        """Return all agents, or a user's (the oldest first); never blocks."""
        registry = self._registry
        if user is not None:
            agents = registry.of_user(user)
            for agent in agents:
                registry.measure(agent)
        else:
            agents = [agent for _, agent in sorted(registry.agents.copy().items())]
        return [registry.view(agent) for agent in agents]

    def user_id(self, user: str) -> int | None:
        """Return the id of the user who has a name now; never blocks."""
        return self._registry.user_id(user)

    def wait(self, name: str, done: Callable[[AgentView | None], bool], seconds: float) -> AgentView | None:
        """Wait until `done(view)` is true (None: the agent is gone) or `seconds` are over; return the last view.

        `done` must be quick and lock-free; it is not called for mere progress (stage, detail).
        """
        agent = self._registry.find(name)
        deadline = Deadline(seconds)
        with agent.lock:
            while True:
                view = None if agent.gone else self._registry.view(agent)
                if done(view) or deadline.expired:
                    return view
                agent.changed.wait(deadline.remaining())

    # --- one agent

    def runtime(self, name: str) -> dict[str, Any]:
        """Return handle, endpoint, host user id, start, spec hash and resource usage."""
        agent = self._registry.find(name)
        row, handle = agent.row, agent.handle
        usage = self._usage([agent]).get(row.name)
        return {
            "handle": handle and {"name": handle.name, "provider": handle.provider, "data": dict(handle.data)},
            "endpoint": row.endpoint or None,
            "uid": row.uid,
            "provider": row.provider,
            "started_at": iso(row.started_at),
            "spec_hash": row.spec_hash or None,
            "usage": usage and dataclasses.asdict(usage),
        }

    def logs(self, name: str, *, tail: int, after: str | None) -> tuple[list[str], str]:
        """Return the last lines, or those after a cursor, and the cursor for the next call.

        :raises Unsupported: the provider keeps no logs.
        """
        agent = self._registry.find(name)
        handle = agent.handle
        if handle is None:
            return [], NO_LINES
        backend = self._registry.backends.get(agent.row.provider)
        return self._logs.lines(backend, handle, tail=tail, after=after, exists=lambda: not agent.gone)

    def events(self, name: str, limit: int) -> list[AgentEvent]:
        """Return the last events, newest last."""
        return self._registry.store.events(self._registry.find(name).row.id, limit)

    def why(self, name: str) -> list[str]:
        """Explain in sentences why an agent is in its state and what happens next."""
        registry, agent = self._registry, self._registry.find(name)
        row = agent.row
        backend = registry.backends.get(row.provider)
        return explain(
            row,
            registry.view(agent),
            now=registry.clock.now(),
            policy=registry.specs.policy(row.app),
            configured=row.app in registry.specs.config.apps,
            capabilities=backend.capabilities,
            backend_since=backend.since,
            backend_problem=str(backend.problem),
            stuck=agent.stuck,
            events=registry.store.events(row.id, RECENT),
            disk=registry.measure(agent),
        )

    # --- usage

    def memory_usage(self) -> dict[str, Any]:
        """Return ``{"total", "average", "agents": [{"name", "memory"}]}`` in bytes."""
        usage = self._usage(list(self._registry.agents.values()))
        memory = {name: each.memory for name, each in sorted(usage.items()) if each.memory is not None}
        total = sum(memory.values())
        return {
            "total": total,
            "average": total // len(memory) if memory else 0,
            "agents": [{"name": name, "memory": value} for name, value in memory.items()],
        }

    def top(self) -> list[dict[str, Any]]:
        """Return every agent with its usage, the busiest first."""
        agents = [agent for _, agent in sorted(self._registry.agents.copy().items())]
        usage = self._usage(agents)
        rows = [self._top_row(agent, usage.get(agent.row.name, Usage())) for agent in agents]
        return sorted(rows, key=lambda row: (-(row["cpu_percent"] or 0.0), -(row["memory"] or 0)))

    def _top_row(self, agent: Agent, usage: Usage) -> dict[str, Any]:
        row = agent.row
        share: float | None = None
        if usage.cpu_seconds is not None:
            share = agent.cpu.sample(boottime(), usage.cpu_seconds)
            if share is None and row.started_at is not None:
                share = usage.cpu_seconds / max(1.0, self._registry.clock.now() - row.started_at)
        return {
            "name": row.name,
            "state": self._registry.view(agent).state.value,
            "memory": usage.memory,
            "cpu_percent": None if share is None else round(100 * share, 1),
            "cpu_seconds": usage.cpu_seconds,
            "disk": usage.disk,
            "disk_limit": usage.disk_limit,
            "last_used": iso(agent.last_used),
        }

    def _usage(self, agents: list[Agent]) -> dict[str, Usage]:
        """Return the usage of agents, as far as it is known: of those that run or are asleep by their backends."""
        wanted: dict[Backend, list[Handle]] = {}
        for agent in agents:
            handle = agent.handle
            if agent.row.observed in ALIVE and handle is not None:
                wanted.setdefault(self._registry.backends.get(agent.row.provider), []).append(handle)
        found = collect_usage(wanted)
        for agent in agents:
            row, usage = agent.row, found.get(agent.row.name)
            if usage is not None and usage.disk is not None:
                agent.disk = DiskUse(usage.disk, usage.disk_limit)
            elif disk := self._registry.measure(agent):
                found[row.name] = dataclasses.replace(usage or Usage(), disk=disk.used, disk_limit=disk.limit)
        return found

    def measure_machines(self) -> None:
        """Measure the data that backends limit themselves; called regularly."""
        registry = self._registry
        both = {Capability.DISK_LIMIT, Capability.OWN_DATA}
        own = {each.name for each in registry.backends if each.reachable and both <= each.capabilities}
        self._usage([agent for agent in list(registry.agents.values()) if agent.row.provider in own])

    # --- providers

    def app_faults(self) -> dict[str, list[str]]:
        """Return, for each app of which no agent could start, why not; apps of unusable providers are left out."""
        registry, found = self._registry, {}
        for name, app in registry.specs.config.apps.items():
            backend = registry.backends.get(app.provider)

            def faults(name: str = name, backend: Backend = backend) -> list[str]:
                return list(faults_of(registry.specs.app(name), backend.provider.faults, backend.plugin))

            with contextlib.suppress(DispatcherError):
                if reasons := backend.call(faults, CHECK):
                    found[name] = reasons
        return found

    def providers(self) -> list[dict[str, Any]]:
        """Return ``[{"name", "isolation", "capabilities", "distribution", "usable", "error"}]``; never blocks."""
        found = []
        for backend in sorted(self._registry.backends, key=lambda backend: backend.name):
            usable = backend.usable and backend.reachable
            found.append(
                {
                    "name": backend.name,
                    "isolation": backend.provider.isolation.name.lower() if backend.usable else None,
                    "capabilities": sorted(item.value for item in backend.capabilities),
                    "distribution": backend.plugin.distribution,
                    "usable": usable,
                    "error": None if usable else str(backend.problem),
                }
            )
        return found

    def check_provider(self, name: str, app: str | None) -> list[Finding]:
        """Return what a provider isolates and what not, for one app or as a whole, and whether its backend works.

        :raises NotFound: there is no such provider or app.
        """
        registry = self._registry
        if name not in {backend.name for backend in registry.backends}:
            known = [backend.name for backend in registry.backends]
            fix = did_you_mean(name, known, "see `dispatcher providers list`")
            raise NotFound(f"There is no provider {printable(name)} in use", fix=fix)
        if app is not None and app not in registry.specs.config.apps:
            fix = did_you_mean(app, registry.specs.config.apps, "see the configuration")
            raise NotFound(f"There is no app {printable(app)}", fix=fix)
        backend = registry.backends.get(name)
        found: list[Finding] = []

        def check() -> None:
            provider = backend.provider
            found.extend(provider.explain(registry.specs.app(app) if app else None))
            apps = [registry.specs.app(each) for each in ([app] if app else registry.specs.apps_of(name))]
            for each in apps:
                found.extend(map(Finding.error, faults_of(each, provider.faults, backend.plugin)))
            capabilities, quotas = backend.capabilities, registry.data.quotas
            if not capabilities & {Capability.OWN_DATA, Capability.DISK_LIMIT}:
                found.append(quotas.finding(wanted=any(each.limits.disk is not None for each in apps)))
                capabilities |= {Capability.DISK_LIMIT} if quotas.enforced else frozenset()
            found.extend(unlimited(apps, provider.isolation, capabilities))
            if provider.isolation < Isolation.VM:  # a virtual machine has no directory of the host
                found.append(registry.data.sockets.finding())
            provider.check(deadline=Deadline(CHECK))

        try:
            backend.call(check, 2 * CHECK)
        except DispatcherError as error:
            what = f"{error.what}: {error.why}" if error.why else error.what
            found.insert(0, Finding(level=Level.ERROR, what=what, fix=error.fix))
        else:
            if backend.usable and backend.contact in {Contact.LOST, Contact.NEVER_ANSWERED}:
                found.insert(0, Finding.error(f"its agents cannot be listed: {backend.problem}"))
        return found
