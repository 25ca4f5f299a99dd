"""The contract of observers: subclass `ObserverContract`, name the plugin, run pytest.

    class TestMine(ObserverContract):
        plugin = "mine"

`docs/reference/conformance-kit.md` describes all checks.  Needs pytest.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import pytest

from dispatcher.config.plugins import Plugins
from dispatcher.plugin.errors import PluginError
from dispatcher.plugin.model import AgentEvent
from dispatcher.testing.authenticator.asker import in_time
from dispatcher.testing.declared import expect_declared_once
from dispatcher.testing.driver import expect
from dispatcher.testing.remains import expect_nothing_left

#: Every kind of event of this release.
KINDS = (
    "created",
    "starting",
    "ready",
    "suspended",
    "hibernated",
    "resumed",
    "stopping",
    "stopped",
    "failed",
    "died",
    "out-of-memory",
    "adopted",
    "unreachable",
    "reachable",
    "outdated",
    "moved",
    "reset",
    "removed",
)
_MANY = 200


class ObserverContract:
    """What an observer must do."""

    #: The name of the entry point.  Must be overridden.
    plugin: ClassVar[str] = ""
    #: Seconds that one event may take.
    patience: ClassVar[float] = 1.0

    @pytest.fixture
    def observers(self) -> Plugins:
        """The plugin, loaded alone as the manager does."""
        if not self.plugin:
            pytest.fail(f"{type(self).__name__} must override plugin: the name of the entry point")
        plugins = Plugins()
        try:
            plugins.load(self.plugin)
        except PluginError as error:
            pytest.fail(f"the plugin {self.plugin!r} does not load: {error}")
        return plugins

    def test_entry_point_is_declared_once(self) -> None:
        """One installed distribution declares an entry point of the plugin's name."""
        expect_declared_once(self.plugin, "MODULE")

    def test_plugin_is_an_observer(self, observers: Plugins) -> None:
        """The plugin loads, and implements the hook of observers."""
        expect(
            "observer" in observers.kinds(self.plugin),
            f"the plugin {self.plugin!r} has no function dispatcher_agent_event(event) marked with @hookimpl",
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_of_event_is_taken(self, observers: Plugins, kind: str) -> None:
        """Every kind of event is taken: no exception, in time."""
        self.send(observers, event(kind))

    def test_later_kinds_are_taken(self, observers: Plugins) -> None:
        """A kind of event that a later release adds is taken, too."""
        self.send(observers, event("a-later-kind"))

    def test_odd_texts_are_taken(self, observers: Plugins) -> None:
        """Long names, names of all scripts and details with line ends, quotes and control characters are taken."""
        for name, detail in (
            ("a" * 255, ""),
            ("漢字@example.org:notebook", "línea\n\tzwei"),
            ("x", 'it said "no"; \\, \x1b[31m, \x00'),
            ("y", "log " * 1000),
        ):
            self.send(observers, event("died", agent=name, detail=detail))

    def test_many_events_leave_nothing(self, observers: Plugins) -> None:
        """Many events leave no descriptor and no thread behind."""
        numbers = itertools.count()
        expect_nothing_left(
            lambda: self.send(observers, event("ready", detail=str(next(numbers)))),
            _MANY,
            "events",
            descriptors="close what you open",
            threads="the manager calls an observer in a thread of its own already",
        )

    def send(self, observers: Plugins, sent: AgentEvent) -> None:
        """Send an event, as the manager does."""
        __tracebackhide__ = True
        answer = in_time(
            "dispatcher_agent_event()",
            lambda: observers.hook.dispatcher_agent_event(event=sent),
            self.patience,
            self.patience,
        )
        expect(
            answer.error is None,
            f"dispatcher_agent_event() raised {type(answer.error).__name__} ({answer.error}) for {sent.kind}: the "
            "manager logs it, and the event is lost",
        )


def event(kind: str, *, agent: str = "alice", detail: str = "") -> AgentEvent:
    """Return an event as the manager makes them."""
    user, _, app = agent.partition(":")
    return AgentEvent(
        time=1_800_000_000.5, agent=agent, user=user, app=app or "notebook", kind=kind, detail=detail
    )
