"""Data that is kept until it is purged: old copies from moves, and the data of agents removed with `--keep-data`.

The live data of an existing agent is never part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dispatcher.manager.agents.agent import Agent, iso
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.files.safe_tree import disk_usage
from dispatcher.manager.storage.rows import CopyRow, KeptRow
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Conflict, NotFound, ProviderError
from dispatcher.plugin.model import Capability, Handle
from dispatcher.plugin.names import printable
from dispatcher.plugin.provider import Progress, no_progress

PURGE = 300.0  # seconds that the caller waits while copies are deleted
DESTROY = 6 * 3600.0  # seconds that a provider has to delete one copy
MEASURE = 2.0  # seconds for the sizes of all directories of one agent; a size that takes longer stays unknown

_log = logging.getLogger("dispatcher.manager")


class Copies:
    """Lists and deletes kept data, by the name of its agent."""

    def __init__(self, registry: Registry, data: AgentData) -> None:
        self._registry = registry
        self._data = data

    def list(self, name: str) -> list[dict[str, Any]]:
        """Return the kept data of an agent, or of a removed agent of this name.

        :raises NotFound: there is no such agent, and nothing was kept of an earlier one.
        """
        kept = self._kept(name)
        deadline = Deadline(MEASURE)
        found = [
            _json(
                copy,
                "an old copy from before the agent moved to another provider",
                self._data.copy_dir(name, copy.directory) if copy.directory else None,
                deadline,
            )
            for copy in self._registry.store.copies(name)
        ]
        if kept is not None:
            own = Capability.OWN_DATA in self._registry.backends.get(kept.provider).capabilities
            directory = None if own else self._data.data_dir(name)
            found.append(_json(kept, "the agent was removed and its data kept", directory, deadline))
        return found

    def purge(self, name: str) -> int:
        """Delete the kept data of an agent, or of a removed agent of this name; return how many copies there were.

        :raises NotFound: there is no such agent, and nothing was kept of an earlier one.
        :raises Conflict: an operation on the agent is in progress.
        :raises DispatcherError: a copy cannot be deleted; it is still listed.
        """
        agent = self._registry.agents.get(name)
        kept = self._kept(name)
        if agent is not None:
            backend = self._registry.backends.get(agent.row.provider)
            return backend.call(lambda: self._purge_existing(agent), PURGE)
        if kept is None:
            raise _busy(name)
        return self._registry.backends.get(kept.provider).call(lambda: self._purge_removed(name), PURGE)

    def delete(self, name: str, provider: str, progress: Progress) -> int:
        """Delete an agent's old copies; return how many there were.  An operation on the agent is in progress.

        :param provider: the agent's own: its data under the agent's name is the live data.
        :raises DispatcherError: one cannot be deleted; those before it are gone.
        """
        copies = self._registry.store.copies(name)
        for copy in copies:
            if copy.directory:
                with _deleting(name):
                    self._data.remove_copy(name, copy.directory)
            elif copy.provider != provider:
                self._destroy(copy, progress)
            self._registry.store.remove_copy(copy.id)
        return len(copies)

    def _kept(self, name: str) -> KeptRow | None:
        if name in self._registry.agents:
            return None
        kept = self._registry.store.kept(name)
        if kept is None:
            self._registry.find(name)
        return kept

    def _purge_existing(self, agent: Agent) -> int:
        try:
            with agent.reserved() as free:
                if free:
                    return self.delete(agent.row.name, agent.row.provider, no_progress)
        finally:
            self._registry.reevaluate(agent)
        raise _busy(agent.row.name)

    def _purge_removed(self, name: str) -> int:
        """Delete the kept data of a removed agent.  Meanwhile no new agent can take the name."""
        with self._registry.name_reserved(name) as free:
            if not free or name in self._registry.agents:
                raise _busy(name)
            kept = self._registry.store.kept(name)
            if kept is None:
                raise NotFound(f"Nothing is kept of an agent {printable(name)}", why="it was purged meanwhile")
            purged = self.delete(name, kept.provider, no_progress)
            if kept.handle:
                self._destroy(kept, no_progress)
            with _deleting(name):
                self._data.remove(name, keep_data=False)
            self._registry.store.remove_kept(name)
        _log.info("Purged the data that was kept of the removed agent %s", printable(name))
        return purged + 1

    def _destroy(self, copy: CopyRow | KeptRow, progress: Progress) -> None:
        self._registry.backends.get(copy.provider).provider.destroy(
            Handle.from_json(copy.handle), data=True, deadline=Deadline(DESTROY), progress=progress
        )


def _json(copy: CopyRow | KeptRow, why: str, directory: Path | None, deadline: Deadline) -> dict[str, Any]:
    return {
        "id": copy.id if isinstance(copy, CopyRow) else None,
        "provider": copy.provider,
        "kind": "directory" if directory else "provider",
        "time": iso(copy.time),
        "why": why,
        "size": disk_usage(directory, deadline) if directory else None,
    }


@contextmanager
def _deleting(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ProviderError(f"A copy of {printable(name)} cannot be deleted", why=str(error)) from error


def _busy(name: str) -> Conflict:
    return Conflict(
        f"{printable(name)} is busy", why="an operation on it is in progress", fix="try again in a moment"
    )
