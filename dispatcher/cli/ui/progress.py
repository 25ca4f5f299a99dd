"""Wait for an agent, with one live line about its state on a terminal.

The manager decides when the state is reached: the request waits there.  Meanwhile a thread asks for the state four
times a second and draws the line.  Where standard error is not a terminal there is no line.
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
from dispatcher.plugin.errors import Conflict, DispatcherError, NotFound, StartFailed, Unavailable

if TYPE_CHECKING:
    from dispatcher.client.manager_client import Json, ManagerClient

INTERVAL = 0.25  # seconds
UNKNOWN = 15.0  # seconds for which a state may be unknown, as the backend does not answer
WAIT = 60.0  # seconds that one request waits at the manager
_WIDTH = 100
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


def follow(
    cli: Cli,
    agent: str,
    send: Callable[[ManagerClient, float | None], Json],
    done: Callable[[Json], bool],
    *,
    wait: bool,
) -> Json:
    """Send a request and return its answer; with `wait`, only once `done` is true of the answer or a later state.

    :param send: sends the request, which may wait at the manager for the given seconds.
    :param done: whether a state (`{}` for an agent that is gone) is the desired one.
    :raises DispatcherError: the manager's error, or the failure of the agent.
    """
    client = cli.client()
    if not wait:
        return send(client, None)
    line = _Line(client, agent)
    if sys.stderr.isatty() and not cli.out.json:
        line.start()
    unknown_since: float | None = None
    try:
        answer = send(client, WAIT)
        wanted = answer.get("desired")
        while not done(answer):
            _raise_failure(answer)
            _raise_if_over(agent, answer, wanted)
            unknown_since = (unknown_since or time.monotonic()) if answer.get("state") == "unknown" else None
            if unknown_since is not None and time.monotonic() - unknown_since > UNKNOWN:
                raise _unknown(agent)
            time.sleep(INTERVAL)
            answer = _state(client, agent)
    except KeyboardInterrupt:
        line.clear()
        cli.out.note(f"no longer waiting; the manager continues (see `dispatcher why {agent}`)")
        raise
    finally:
        line.clear()
    return answer


def _state(client: ManagerClient, agent: str) -> Json:
    try:
        return client.state(agent)
    except NotFound:
        return {}


def _raise_if_over(agent: str, state: Json, wanted: object) -> None:
    """Raise an error if what is awaited can no longer happen."""
    if not state:
        raise NotFound(f"The agent {agent} no longer exists", why="it was removed meanwhile")
    if state.get("desired") != wanted:
        raise Conflict(
            f"The desired state of {agent} is {state.get('desired')} now", why="another request set it meanwhile"
        )


def _unknown(agent: str) -> Unavailable:
    return Unavailable(
        f"The state of {agent} is unknown",
        why="its backend does not answer; the manager continues when it does",
        fix=f"see `dispatcher why {agent}` and `dispatcher providers list`",
    )


def _raise_failure(state: Json) -> None:
    failure: dict[str, Any] | None = state.get("failure")
    if state.get("state") in {"failed", "removing"} and failure:
        raise StartFailed(
            str(failure.get("what") or "The agent failed"),
            why=str(failure.get("why") or ""),
            fix=str(failure.get("fix") or ""),
            details={"log": failure.get("log") or []},
        )


class _Line(threading.Thread):
    """One line of standard error that is drawn again and again until it is cleared."""

    def __init__(self, client: ManagerClient, agent: str) -> None:
        super().__init__(name="progress", daemon=True)
        self._client, self._agent = client, agent
        self._cleared = threading.Event()

    def run(self) -> None:
        began, turn, shown = time.monotonic(), 0, 0
        while not self._cleared.wait(INTERVAL):
            try:
                state = describe(_state(self._client, self._agent))
            except DispatcherError:
                continue  # the request itself reports it
            turn += 1
            passed = humanize.short_duration(time.monotonic() - began)
            text = clean(f"{_SPINNER[turn % len(_SPINNER)]} {self._agent} {state}  {passed}")
            text = text.replace("\n", " ")[:_WIDTH]
            click.echo(f"\r{text.ljust(shown)}", err=True, nl=False)
            shown = len(text)
        if shown:
            click.echo(f"\r{' ' * shown}\r", err=True, nl=False)

    def clear(self) -> None:
        """Stop and leave nothing of the line."""
        self._cleared.set()
        if self.is_alive():
            self.join(1.0)


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
