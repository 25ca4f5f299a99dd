"""Waiting for an agent, with one live line of what happens meanwhile.  Touches the manager and standard error.

The manager decides when the state is reached: one request waits for that in a thread, while the state is asked
for four times a second to keep the line alive.  Where standard error is no terminal there is no line.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from dispatcher.cli.context import Cli
from dispatcher.cli.ui.output import clean
from dispatcher.common import humanize
from dispatcher.plugin.errors import NotFound, StartFailed

if TYPE_CHECKING:
    from dispatcher.client.manager_client import Json, ManagerClient

INTERVAL = 0.25  # seconds
WAIT = 60.0  # seconds that one request waits at the manager
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


def follow(
    cli: Cli,
    agent: str,
    ask: Callable[[ManagerClient, float | None], Json],
    done: Callable[[Json], bool],
    *,
    wait: bool,
) -> Json:
    """Ask the manager for something and return its answer, once `done` is true of it unless `wait` is false.

    :param ask: sends the request, which may wait at the manager for so many seconds.
    :param done: whether a state (`{}`: the agent is gone) is the one asked for.
    :raises DispatcherError: what the manager answered, or how the agent failed.
    """
    if not wait:
        return ask(cli.client(), None)
    work = _Work(cli.client(), agent, ask, done)
    work.start()
    line = _Line(sys.stderr.isatty() and not cli.out.json)
    try:
        client = cli.client()
        while not work.finished.wait(INTERVAL):
            if line.visible:
                line.show(agent, _state(client, agent))
    except KeyboardInterrupt:
        line.clear()
        cli.out.note(f"no longer waiting; the manager goes on (see `dispatcher why {agent}`)")
        raise
    finally:
        line.clear()
    if work.error is not None:
        raise work.error
    return work.answer


class _Work(threading.Thread):
    def __init__(
        self,
        client: ManagerClient,
        agent: str,
        ask: Callable[[ManagerClient, float | None], Json],
        done: Callable[[Json], bool],
    ) -> None:
        super().__init__(name="wait", daemon=True)
        self.answer: Json = {}
        self.error: Exception | None = None
        self.finished = threading.Event()
        self._client, self._agent, self._ask, self._done = client, agent, ask, done

    def run(self) -> None:
        try:
            answer = self._ask(self._client, WAIT)
            while not self._done(answer):
                _raise_failure(answer)
                time.sleep(INTERVAL)
                answer = _state(self._client, self._agent)
            self.answer = answer
        except Exception as error:
            self.error = error
        finally:
            self.finished.set()


def _state(client: ManagerClient, agent: str) -> Json:
    try:
        return client.state(agent)
    except NotFound:
        return {}


def _raise_failure(state: Json) -> None:
    failure: dict[str, Any] | None = state.get("failure")
    if state.get("state") == "failed" and failure:
        raise StartFailed(
            str(failure.get("what") or "The agent failed"),
            why=str(failure.get("why") or ""),
            fix=str(failure.get("fix") or ""),
            details={"log": failure.get("log") or []},
        )


class _Line:
    """One line of standard error that is written over and over.

    :ivar visible: whether there is a terminal to show it on.
    """

    def __init__(self, visible: bool) -> None:
        self.visible = visible
        self._shown = 0
        self._began = time.monotonic()
        self._turn = 0

    def show(self, agent: str, state: Json) -> None:
        """Draw what the state says."""
        self._turn += 1
        text = f"{_SPINNER[self._turn % len(_SPINNER)]} {agent} {describe(state)}"
        text += f"  {humanize.short_duration(time.monotonic() - self._began)}"
        width = max(20, click.get_current_context().max_content_width or 79)
        text = clean(text).replace("\n", " ")[:width]
        click.echo(f"\r{text.ljust(self._shown)}", err=True, nl=False)
        self._shown = len(text)

    def clear(self) -> None:
        """Leave no trace of the line."""
        if self._shown:
            click.echo(f"\r{' ' * self._shown}\r", err=True, nl=False)
            self._shown = 0


def describe(state: Json) -> str:
    """Return one phrase for a state: ``starting: pulling the image, layer 3 of 7 (42 %)``."""
    if not state:
        return "is gone"
    text = str(state.get("state", ""))
    steps = [str(state[key]) for key in ("stage", "detail") if state.get(key)]
    if steps:
        text += ": " + ", ".join(steps)
    fraction = state.get("fraction")
    if isinstance(fraction, (int, float)):
        text += f" ({fraction:.0%})"
    return text
