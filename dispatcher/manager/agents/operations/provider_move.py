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
from dispatcher.manager.agents.lifecycle import CLEARED, Change, EventKind
from dispatcher.manager.agents.operations.task import Task
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.backends.backend import Backend
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.files.manifest import differences, manifest
from dispatcher.manager.files.safe_tree import exists
from dispatcher.manager.storage.rows import CopyRow, Move
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError, ProviderError
from dispatcher.plugin.model import BackendState, Capability, Handle
from dispatcher.plugin.names import printable
from dispatcher.plugin.provider import no_progress
from dispatcher.plugin.tree_removal import remove_tree

TRANSFER = 6 * 3600.0  # seconds that one export or import may take
SCRATCH, CHECK = "moving", "verifying"  # directories beside the agent's data

_log = logging.getLogger("dispatcher.manager")


class Mover:
    """Migrates agents."""

    def __init__(self, registry: Registry, data: AgentData) -> None:
        self._registry = registry
        self._data = data

    def move(self, task: Task) -> Change:
        """Move a stopped agent to its app's provider; the next operation starts it there.

        :raises DispatcherError: it is where it was, intact, and can be started there.
        """
        if self.complete(task):
            return Change(_DONE)
        registry, row = self._registry, task.row
        if row.move is not None:
            self.clean_up(task.agent)
        target = registry.specs.provider(row)
        if target == row.provider:  # the configuration names the old provider again
            return Change(_DONE)
        move = Move(source=row.provider, target=target, step="checking", since=registry.clock.now())
        task.update(move=move)
        try:
            self._transfer(task, registry.backends.get(row.provider), registry.backends.get(target))
        except Exception:
            self.clean_up(task.agent)
            raise
        self.complete(task)
        return Change(_DONE)

    def complete(self, task: Task) -> bool:
        """Complete a migration whose hand-over was written; return whether there was one."""
        row, move = task.row, task.row.move
        if move is None or not move.settling:
            return False
        self._step(task, "tidying up")
        scratch = self._data.paths.agent_dir(row.name) / SCRATCH
        if move.install:
            self._data.install(row.name, row.uid, scratch, task.operation.check)
        if move.copy:
            self._data.store_copy(row.name, row.uid, move.copy)
        for name in (SCRATCH, CHECK):
            remove_tree(self._data.paths.agent_dir(row.name) / name, deadline=Deadline(TRANSFER))
        task.update(move=None)
        return True

    def _step(self, task: Task, step: str) -> None:
        task.step(step)
        if task.row.move:
            task.update(move=dataclasses.replace(task.row.move, step=step))

    def _transfer(self, task: Task, source: Backend, target: Backend) -> None:
        registry, row = self._registry, task.row
        spec = registry.specs.spec(row)
        self._step(task, "checking")
        target.provider.check(deadline=Deadline(60))
        target.prepare(spec.app, seconds=task.policy.prepare_timeout, progress=task.progress)
        old = task.handle
        self._step(task, "stopping")
        if old is not None:
            task.stop(old)
        exports = Capability.OWN_DATA in source.capabilities and old is not None
        imports = Capability.OWN_DATA in target.capabilities
        directory = self._data.data_dir(row.name)
        if exports and old is not None:
            self._step(task, "exporting")
            directory = self._data.empty_dir(row.name, SCRATCH)
            source.provider.export_data(old, directory, deadline=Deadline(TRANSFER), progress=task.progress)
        elif task.agent.last_used is not None:
            self._data.check_present(row.name)
        handle = target.provider.handle(spec)
        imports = imports and exists(directory)
        if imports:
            self._import(task, target, handle, directory)
        self._step(task, "handing over")
        self._hand_over(task, handle, exports=exports, imports=imports)
        if old is not None:
            try:  # without data; a backend that does not answer keeps it, stopped
                source.provider.destroy(old, data=False, deadline=Deadline(300), progress=task.progress)
            except DispatcherError as error:
                _log.warning(
                    "%s: the remains on %s cannot be removed: %s", printable(row.name), source.name, error
                )

    def _import(self, task: Task, target: Backend, handle: Handle, directory: Path) -> None:
        """Import into the target, and export again to verify."""
        row = task.row

        def tick() -> None:
            task.progress(task.operation.stage)

        self._save_older_copy(task, target)
        self._step(task, "importing")
        if row.move:
            task.update(move=dataclasses.replace(row.move, handle=handle.to_json()))
        target.provider.import_data(handle, directory, deadline=Deadline(TRANSFER), progress=task.progress)
        self._step(task, "verifying")
        check = self._data.empty_dir(row.name, CHECK)
        target.provider.export_data(handle, check, deadline=Deadline(TRANSFER), progress=task.progress)
        wrong = differences(manifest(directory, tick), manifest(check, tick))
        remove_tree(check, deadline=Deadline(TRANSFER))
        if wrong:
            raise ProviderError(
                f"The data did not arrive intact on {target.name}",
                why="; ".join(wrong),
                fix="fix what is named (chown, for another owner) and start the agent again, or set the app's "
                "provider back; the old data is untouched",
            )

    def _hand_over(self, task: Task, handle: Handle, *, exports: bool, imports: bool) -> None:
        """Make the agent the target's, in one transaction with the record of the old copy."""
        registry = self._registry
        now = registry.clock.now()
        with task.agent.lock:
            task.operation.check()
            row = task.row
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
            task.agent.row = moved
        registry.observers.publish([event])

    def _save_older_copy(self, task: Task, target: Backend) -> None:
        """Export what the target still holds of an earlier move: the import would replace it."""
        for copy in self._registry.store.copies(task.row.name):
            if copy.provider == target.name and not copy.directory:
                self._step(task, "saving an older copy")
                name = f"{int(copy.time)}-{copy.provider}"
                directory = self._data.empty_dir(task.row.name, f"copies/{name}")
                target.provider.export_data(
                    Handle.from_json(copy.handle),
                    directory,
                    deadline=Deadline(TRANSFER),
                    progress=task.progress,
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
