"""A time limit for the author's fixtures that make an instance: one that hangs is a verdict, and not a hang."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

AGAIN = 0.05  # seconds for a fixture of a class that has hung already
_NAME = "dispatcher-fixtures"
_MADE_BY = {"provider": "check()", "authenticator": "authenticate()"}  # the fixture -> where its class may connect


class FixtureLimit:
    """A plugin of pytest, registered by the contracts.  It waits once for each class."""

    def __init__(self) -> None:
        self._hung: set[type] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """Limit the time of a fixture."""
        name = fixturedef.argname
        owner: Any = getattr(request, "cls", None)  # a fixture of a module or a session belongs to no class
        if name not in _MADE_BY or not hasattr(owner, "patience"):
            return (yield)
        seconds = owner.patience + owner.slack
        guide = f"docs/howto/write-{'a' if name == 'provider' else 'an'}-{name}.md"
        message = (
            f"the fixture `{name}` has not returned after {seconds:g} s: the constructor must not wait, "
            f"connect in {_MADE_BY[name]} or later\nRead {guide}"
        )

        def hung() -> None:
            self._hung.add(owner)
            pytest.fail(message, pytrace=False)

        with _interrupted(AGAIN if owner in self._hung else seconds, hung):
            return (yield)


def limit_fixtures(request: pytest.FixtureRequest) -> None:
    """Register the plugin, once in each session."""
    if not request.config.pluginmanager.has_plugin(_NAME):
        request.config.pluginmanager.register(FixtureLimit(), _NAME)


@contextlib.contextmanager
def _interrupted(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call a function, which raises, after so many seconds of the block; an earlier alarm keeps its time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, lambda *_: call())
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    began = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)), interval)
