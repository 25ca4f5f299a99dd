"""Observers of events with one fault each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dispatcher.plugin import hookimpl
from tests.support.broken.providers import forever


class _Observer:
    def __init__(self, call: Any) -> None:
        self._call = call

    @hookimpl
    def dispatcher_agent_event(self, event: Any) -> None:
        self._call(event)


def _hang(_event: object) -> None:
    forever()


def _exit(_event: object) -> None:
    raise SystemExit(9)


def _interrupt(_event: object) -> None:
    raise KeyboardInterrupt


plugin_hangs, plugin_exits, plugin_interrupts = _Observer(_hang), _Observer(_exit), _Observer(_interrupt)


def entries() -> Iterator[tuple[str, str]]:
    """Yield the name and the attribute of each plugin."""
    for name in ("hangs", "exits", "interrupts"):
        yield f"observer-{name}", f"plugin_{name}"
