"""The plugins of this installation: what each is, its distribution, whether it is used, what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from dispatcher.config.plugins import Plugins
from dispatcher.config.plugins_used import configured
from dispatcher.manager.rest.routing import Json
from dispatcher.manager.rest.services import Services
from dispatcher.plugin.errors import DispatcherError


@dataclass(frozen=True, slots=True)
class PluginState:
    """One plugin.

    :ivar kinds: provider, authenticator, observer; none for one that was not imported, as nothing uses it.
    :ivar error: in a sentence what is wrong with it, None if nothing is known to be; :ivar fix: the end of that
        sentence, what to do, if known.
    """

    name: str
    distribution: str
    kinds: list[str]
    configured: bool
    error: str | None
    fix: str

    def to_json(self) -> Json:
        """Return the form of the REST interface."""
        return asdict(self)


def plugin_states(services: Services) -> Iterator[PluginState]:
    """Yield all plugins that are installed or used.  Never waits for one."""
    plugins, used = services.plugins, configured(services.config)
    backends = {backend["name"]: backend for backend in services.supervisor.queries.providers()}
    installed = plugins.available()
    for name in sorted({*installed, *used, *backends}):
        kinds = plugins.kinds(name) or ([used[name]] if name in used else [])
        problem = _problem(name, services, plugins, backends.get(name))
        yield PluginState(
            name=name,
            distribution=installed.get(name, ""),
            kinds=kinds,
            configured=name in used or name in backends,
            error=str(problem) if problem else None,
            fix=problem.fix if isinstance(problem, DispatcherError) else "",
        )


def _problem(
    name: str, services: Services, plugins: Plugins, backend: Json | None
) -> DispatcherError | str | None:
    if refusal := plugins.refusal(name):
        return refusal
    if backend is not None and not backend["usable"]:
        return str(backend["error"])
    for entry, problem in services.signin.authenticators.problems():
        if entry.name.partition(".")[0] == name:
            return problem
    observer = services.supervisor.observers.states.get(name)
    return (observer.problem or None) if observer else None
