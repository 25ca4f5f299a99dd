"""Why containers ended, and which were stopped on purpose.  Touches the engine and the provider's state_dir.

A container that was stopped has an exit code like one that ended by itself; a note on this side tells the two
apart.  The summary of many containers does not say which ran out of memory: that is asked for each, once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from dispatcher.plugin import Deadline, Handle, Observation, ProviderError
from dispatcher_docker import logs, observing, runs
from dispatcher_docker.engine import Engine

#: So many ended containers are asked one by one, in one `list`.
_ASK_AT_ONCE = 32


class Endings:
    """What is known of containers that do not run.

    :param state_dir: the provider's own.
    """

    def __init__(self, engine: Engine, state_dir: Path) -> None:
        self._engine = engine
        self._notes = state_dir / "stopped"
        self._reasons: dict[str, str] = {}

    def note_stop(self, handle: Handle, container: str) -> None:
        """Remember that this container is being stopped on purpose."""
        self._notes.mkdir(mode=0o700, exist_ok=True)
        (self._notes / handle.name).write_text(container, encoding="ascii")

    def forget(self, handle: Handle) -> None:
        """Forget it: the container starts, or is gone."""
        (self._notes / handle.name).unlink(missing_ok=True)

    def was_stopped(self, handle: Handle, container: str) -> bool:
        """Whether this container was stopped on purpose."""
        try:
            return (self._notes / handle.name).read_text(encoding="ascii") == container
        except OSError:
            return False

    def complete(self, handle: Handle, container: str, seen: Observation, deadline: Deadline) -> Observation:
        """Return an ended container's observation with its last words."""
        if self.was_stopped(handle, container):
            return replace(seen, exit_reason="")
        return replace(seen, detail=seen.detail or " | ".join(self.last_lines(handle, deadline)))

    def complete_many(
        self, found: Iterable[tuple[Handle, str, Observation]], deadline: Deadline
    ) -> Iterable[Observation]:
        """Yield the observations of ended containers with their reasons, in few requests."""
        asked = 0
        known: dict[str, str] = {}
        for handle, container, seen in found:
            if self.was_stopped(handle, container):
                yield replace(seen, exit_reason="")
                continue
            reason = self._reasons.get(container)
            if reason is None and seen.exit_reason and asked < _ASK_AT_ONCE:
                asked += 1
                inspected = runs.inspect(self._engine, container, deadline)
                if inspected and runs.status(inspected) not in runs.ALIVE:
                    reason = observing.reason(inspected["State"])
            if reason is not None:
                known[container] = reason
            yield replace(seen, exit_reason=seen.exit_reason if reason is None else reason)
        self._reasons = known

    def last_lines(self, handle: Handle, deadline: Deadline) -> list[str]:
        """Return the last lines of a container's output, "" where there are none."""
        try:
            found = logs.read(self._engine, handle.name, tail=3, deadline=deadline)
        except ProviderError:
            return []
        return [line.decode(errors="replace")[:200] for line in found]
