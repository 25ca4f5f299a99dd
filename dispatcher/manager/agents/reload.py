"""Applying a new configuration while agents run."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from dispatcher.config.load import Config
from dispatcher.manager.agents.change import Change, EventKind, Write
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.agents.specs import Specs
from dispatcher.manager.storage.rows import AgentRow

_log = logging.getLogger("dispatcher.manager")


def app_changes(old: Config, new: Config) -> Iterator[str]:
    """Describe the differences between the apps in sentences."""
    for name in sorted(old.apps.keys() | new.apps.keys()):
        before, after = old.apps.get(name), new.apps.get(name)
        if before is None:
            yield f"The app {name} is new."
        elif after is None:
            yield f"The app {name} was removed: its agents can be stopped, not started."
        elif before.provider != after.provider:
            yield (
                f"The app {name} has the provider {after.provider} instead of {before.provider}: "
                "its agents move at their next start."
            )
        elif before != after:
            one, two = before.model_dump(), after.model_dump()
            keys = ", ".join(sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key)))
            yield f"The app {name} has changed: {keys}."


def provider_changes(old: Config, new: Config) -> list[str]:
    """Return the providers whose own options differ."""
    names = old.providers.keys() | new.providers.keys()
    return sorted(name for name in names if old.providers.get(name, {}) != new.providers.get(name, {}))


def renew(registry: Registry, specs: Specs) -> int:
    """Use new specs, and retry final failures; return how many agents are newly outdated."""
    old, registry.specs = registry.specs, specs
    newly = 0
    for agent in list(registry.agents.values()):
        row = agent.row
        became = specs.outdated(row) and not old.outdated(row)
        newly += became

        def decide(row: AgentRow, became: bool = became) -> Change:
            fields = {}
            if row.failure is not None and row.failure.final:
                fields["retry_at"] = registry.clock.now()
            events = [(EventKind.OUTDATED, "the configuration has changed")] if became else []
            return Change(fields, events, write=Write.LATER)

        registry.change(agent, decide)
    registry.flush()
    return newly
