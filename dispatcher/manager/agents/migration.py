"""Migrating an agent and its data to another provider: stop, export, import, verify, hand over.

Until one transaction makes the target the agent's provider, the source keeps everything as it was, and a migration
that fails or is interrupted begins again from there.  After it, the completion is repeated until it succeeds.  The
old copy is kept until purged: by the old provider, or as a directory.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from dispatcher.manager.agents.agent import Agent
from dispatcher.manager.agents.change import Change, EventKind
from dispatcher.manager.agents.operation import Operation
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.agents.transitions import CLEARED
from dispatcher.manager.backends.backend import Backend
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.files.manifest import differences, manifest
from dispatcher.manager.files.safe_tree import exists, remove_tree
from dispatcher.manager.storage.rows import CopyRow, Move
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError, ProviderError
from dispatcher.plugin.model import BackendState, Capability, Handle
from dispatcher.plugin.names import printable
from dispatcher.plugin.provider import no_progress

TRANSFER = 6 * 3600.0  # seconds that one export or import may take
SCRATCH, CHECK = "moving", "verifying"  # directories beside the agent's data

_log = logging.getLogger("dispatcher.manager")


class Migrator:
    """Migrates agents."""

    def __init__(self, registry: Registry, data: AgentData) -> None:
        self._registry = registry
        self._data = data

    def move(self, agent: Agent, operation: Operation) -> Change:
        """Move a stopped agent to its app's provider; the next operation starts it there.

        :raises DispatcherError: it is where it was, intact, and can be started there.
        """
        if self.complete(agent, operation):
            return Change(_DONE)
        registry, row = self._registry, agent.row
        if row.move is not None:
            self.clean_up(agent)
        target = registry.specs.provider(row)
        if target == row.provider:  # the configuration names the old provider again
            return Change(_DONE)
        move = Move(source=row.provider, target=target, step="checking", since=registry.clock.now())
        registry.update(agent, operation, move=move)
        try:
            self._transfer(agent, operation, registry.backends.get(row.provider), registry.backends.get(target))
        except Exception:
            self.clean_up(agent)
            raise
        self.complete(agent, operation)
        return Change(_DONE)

    def complete(self, agent: Agent, operation: Operation) -> bool:
        """Complete a migration whose hand-over was written; return whether there was one."""
        row, move = agent.row, agent.row.move
        if move is None or not move.settling:
            return False
        self._step(agent, operation, "tidying up")
        scratch = self._data.paths.agent_dir(row.name) / SCRATCH
        if move.install:
            self._data.install(row.name, row.uid, scratch, operation.check)
        if move.copy:
            self._data.store_copy(row.name, row.uid, move.copy)
        for name in (SCRATCH, CHECK):
            remove_tree(self._data.paths.agent_dir(row.name) / name, deadline=Deadline(TRANSFER))
        self._registry.update(agent, operation, move=None)
        return True

    def _step(self, agent: Agent, operation: Operation, step: str) -> None:
        self._registry.step(agent, operation, step)
        if agent.row.move:
            self._registry.update(agent, operation, move=dataclasses.replace(agent.row.move, step=step))

    def _transfer(self, agent: Agent, operation: Operation, source: Backend, target: Backend) -> None:
        registry, row = self._registry, agent.row
        progress = registry.progress(agent, operation)
        policy = registry.specs.policy(row.app)
        spec = registry.specs.spec(row)
        self._step(agent, operation, "checking")
        target.provider.check(deadline=Deadline(60))
        target.prepare(spec.app, seconds=policy.prepare_timeout, progress=progress)
        old = agent.handle
        self._step(agent, operation, "stopping")
        if old is not None:
            source.provider.stop(
                old, grace=policy.stop_grace, deadline=Deadline(policy.stop_grace + 30), progress=progress
            )
        exports = Capability.OWN_DATA in source.capabilities and old is not None
        imports = Capability.OWN_DATA in target.capabilities
        directory = self._data.data_dir(row.name)
        if exports and old is not None:
            self._step(agent, operation, "exporting")
            directory = self._data.empty_dir(row.name, SCRATCH)
            source.provider.export_data(old, directory, deadline=Deadline(TRANSFER), progress=progress)
        handle = target.provider.handle(spec)
        imports = imports and exists(directory)
        if imports:
            self._import(agent, operation, target, handle, directory)
        self._step(agent, operation, "handing over")
        self._hand_over(agent, operation, handle, exports=exports, imports=imports)
        if old is not None:
            try:  # without data; a backend that does not answer keeps it, stopped
                source.provider.destroy(old, data=False, deadline=Deadline(300), progress=progress)
            except DispatcherError as error:
                _log.warning(
                    "%s: the remains on %s cannot be removed: %s", printable(row.name), source.name, error
                )

    def _import(
        self, agent: Agent, operation: Operation, target: Backend, handle: Handle, directory: Path
    ) -> None:
        """Import into the target, and export again to verify."""
        registry, row = self._registry, agent.row
        progress = registry.progress(agent, operation)

        def tick() -> None:
            progress(operation.stage)

        self._save_older_copy(agent, operation, target)
        self._step(agent, operation, "importing")
        if row.move:
            registry.update(agent, operation, move=dataclasses.replace(row.move, handle=handle.to_json()))
        target.provider.import_data(handle, directory, deadline=Deadline(TRANSFER), progress=progress)
        self._step(agent, operation, "verifying")
        check = self._data.empty_dir(row.name, CHECK)
        target.provider.export_data(handle, check, deadline=Deadline(TRANSFER), progress=progress)
        wrong = differences(manifest(directory, tick), manifest(check, tick))
        remove_tree(check, deadline=Deadline(TRANSFER))
        if wrong:
            raise ProviderError(
                f"The data did not arrive intact on {target.name}",
                why="; ".join(wrong),
                fix="fix what is named (chown, for another owner) and start the agent again, or set the app's "
                "provider back; the old data is untouched",
            )

    def _hand_over(
        self, agent: Agent, operation: Operation, handle: Handle, *, exports: bool, imports: bool
    ) -> None:
        """Make the agent the target's, in one transaction with the record of the old copy."""
        registry = self._registry
        now = registry.clock.now()
        with agent.lock:
            operation.check()
            row = agent.row
            move = row.move
            if move is None:
                raise RuntimeError("there is no move to hand over")
            copy = f"{int(now)}-{move.source}" if imports and not exports else ""
            moved = dataclasses.replace(
                row,
                version=row.version + 1,
                provider=move.target,
                handle=handle.to_json(),
                observed=BackendState.ABSENT,
                spec_hash="",
                endpoint="",
                move=dataclasses.replace(move, settling=True, copy=copy, install=exports and not imports),
            )
            event = registry.event(row, EventKind.MOVED, f"from {move.source} to {move.target}")
            if exports or copy:
                kept = CopyRow(
                    id=0,
                    agent=row.name,
                    provider=move.source,
                    directory=copy,
                    handle="" if copy else row.handle,
                    time=now,
                )
                registry.store.add_copy(kept, moved, [(row.id, event)])
            else:
                registry.store.save([moved], [(row.id, event)])
            agent.row = moved
        registry.observers.publish([event])

    def _save_older_copy(self, agent: Agent, operation: Operation, target: Backend) -> None:
        """Export what the target still holds of an earlier move: the import would replace it."""
        for copy in self._registry.store.copies(agent.row.name):
            if copy.provider == target.name and not copy.directory:
                self._step(agent, operation, "saving an older copy")
                name = f"{int(copy.time)}-{copy.provider}"
                directory = self._data.empty_dir(agent.row.name, f"copies/{name}")
                target.provider.export_data(
                    Handle.from_json(copy.handle),
                    directory,
                    deadline=Deadline(TRANSFER),
                    progress=self._registry.progress(agent, operation),
                )
                self._registry.store.set_copy_directory(copy.id, name)

    def clean_up(self, agent: Agent) -> None:
        """Remove what a failed migration left on its target and beside the data."""
        row, move = agent.row, agent.row.move
        if move is None or move.settling:
            return
        try:
            for name in (SCRATCH, CHECK):
                remove_tree(self._data.paths.agent_dir(row.name) / name, deadline=Deadline(TRANSFER))
            if move.handle:
                self._registry.backends.get(move.target).provider.destroy(
                    Handle.from_json(move.handle), data=True, deadline=Deadline(300), progress=no_progress
                )
        except (OSError, DispatcherError) as error:
            _log.warning("%s: the remains of a failed move cannot be removed: %s", printable(row.name), error)


_DONE = {"move": None, **CLEARED}
