"""What people can look at: an agent's runtime, why it is so, the providers.  Changes nothing."""

from __future__ import annotations

from typing import Any

from dispatcher.manager.agents import explain
from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.registry import Engine
from dispatcher.manager.agents.views import iso
from dispatcher.manager.backends.usage import Usages
from dispatcher.manager.files.socket_tmpfs import EndpointSpace
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError, NotFound
from dispatcher.plugin.model import Finding, Isolation, Level
from dispatcher.plugin.names import printable

CHECK = 10.0  # seconds
RECENT = 20  # events that an explanation looks at


class Inspection:
    """Answers for `Supervisor`, in the forms of the REST interface."""

    def __init__(self, engine: Engine, usages: Usages, endpoints: EndpointSpace) -> None:
        self._engine = engine
        self._usages = usages
        self._endpoints = endpoints

    def runtime(self, agent: Agent) -> dict[str, Any]:
        """Return where an agent runs, and what it uses."""
        row, handle = agent.row, agent.handle
        usage = self._usages.collect([agent]).get(row.name)
        return {
            "handle": handle and {"name": handle.name, "provider": handle.provider, "data": dict(handle.data)},
            "endpoint": row.endpoint or None,
            "uid": row.uid,
            "provider": row.provider,
            "started_at": iso(row.started_at),
            "spec_hash": row.spec_hash or None,
            "usage": usage and {"memory": usage.memory, "cpu_seconds": usage.cpu_seconds, "disk": usage.disk},
        }

    def why(self, agent: Agent) -> list[str]:
        """Return why an agent is in its state."""
        engine, row = self._engine, agent.row
        backend = engine.backends.get(row.provider)
        return explain.sentences(
            row,
            engine.view(agent),
            now=engine.clock.now(),
            policy=engine.specs.policy(row.app),
            configured=row.app in engine.specs.config.apps,
            capabilities=backend.capabilities,
            backend_since=backend.since,
            backend_problem=str(backend.problem),
            stuck=agent.stuck,
            events=engine.store.events(row.id, RECENT),
        )

    def providers(self) -> list[dict[str, Any]]:
        """Return all providers, as they were when last asked; never blocks."""
        found = []
        for backend in sorted(self._engine.backends, key=lambda backend: backend.name):
            usable = backend.usable and backend.reachable
            found.append(
                {
                    "name": backend.name,
                    "isolation": backend.guard.provider.isolation.name.lower() if backend.usable else None,
                    "capabilities": sorted(item.value for item in backend.capabilities),
                    "distribution": backend.origin,
                    "usable": usable,
                    "error": None if usable else str(backend.problem),
                }
            )
        return found

    def check_provider(self, name: str, app: str | None) -> list[Finding]:
        """Ask a provider what it isolates, and whether its backend can be used."""
        engine = self._engine
        if name not in {backend.name for backend in engine.backends}:
            raise NotFound(f"There is no provider {printable(name)} in use", fix="see `dispatcher providers list`")
        if app is not None and app not in engine.specs.config.apps:
            raise NotFound(f"There is no app {printable(app)}", fix="see the configuration")
        backend = engine.backends.get(name)
        found: list[Finding] = []

        def check() -> None:
            guard = backend.guard
            found.extend(guard.explain(engine.specs.app(app) if app else None))
            if guard.provider.isolation < Isolation.VM:  # a machine has no directory of the host
                found.append(self._endpoints.finding())
            guard.check(deadline=Deadline(CHECK))

        try:
            backend.ask(check, 2 * CHECK)
        except DispatcherError as error:
            what = f"{error.what}: {error.why}" if error.why else error.what
            found.insert(0, Finding(level=Level.ERROR, what=what, fix=error.fix))
        return found
