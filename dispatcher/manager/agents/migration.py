"""Moving an agent and its data to another provider: stop, export, import, verify, then it is the other's.

Until one transaction makes the target the agent's provider, the source keeps everything as it was, and a move
that fails or is interrupted begins again from there.  After it, tidying up is repeated until it is done.  The
old copy is kept until purged: by the old provider itself, or as a directory.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from dispatcher.manager.agents.agent import Agent, Operation
from dispatcher.manager.agents.registry import Change, Engine
from dispatcher.manager.backends.backend import Backend
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.files.safe_tree import differences, exists, manifest, remove_tree
from dispatcher.manager.storage.agents import CopyRow, Move
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError, ProviderError
from dispatcher.plugin.model import BackendState, Capability, Handle
from dispatcher.plugin.names import printable

TRANSFER = 6 * 3600.0  # seconds that one export or import may take
SCRATCH, CHECK = "moving", "verifying"  # directories beside the agent's data

_log = logging.getLogger("dispatcher.manager")


class Mover:
    """Carries out moves."""

    def __init__(self, engine: Engine, data: AgentData) -> None:
        self._engine = engine
        self._data = data

    def move(self, agent: Agent, operation: Operation) -> Change:
        """Move a stopped agent to its app's provider; the next operation starts it there.

        :raises DispatcherError: it is where it was, intact, and can be started there.
        """
        if self.settle(agent, operation):
            return Change(_DONE)
        engine, row = self._engine, agent.row
        if row.move is not None:
            self.abandon(agent)
        target = engine.specs.provider(row)
        if target == row.provider:  # the configuration says the old place again
            return Change(_DONE)
        move = Move(source=row.provider, target=target, step="checking", since=engine.clock.now())
        engine.update(agent, operation, move=move)
        try:
            self._transfer(agent, operation, engine.backends.get(row.provider), engine.backends.get(target))
        except Exception:
            self.abandon(agent)
            raise
        self.settle(agent, operation)
        return Change(_DONE)

    def settle(self, agent: Agent, operation: Operation) -> bool:
        """Tidy up after the agent became the target's, if that is still to be done; return whether it was."""
        row, move = agent.row, agent.row.move
        if move is None or not move.settling:
            return False
        self._step(agent, operation, "tidying up")
        scratch = self._data.paths.agent_dir(row.name) / SCRATCH
        if move.install:
            self._data.install(row, scratch, operation.check)
        if move.copy:
            self._data.store_copy(row, move.copy)
        for name in (SCRATCH, CHECK):
            remove_tree(self._data.paths.agent_dir(row.name) / name, deadline=Deadline(TRANSFER))
        self._engine.update(agent, operation, move=None)
        return True

    def _step(self, agent: Agent, operation: Operation, step: str) -> None:
        self._engine.step(agent, operation, step)
        if agent.row.move:
            self._engine.update(agent, operation, move=dataclasses.replace(agent.row.move, step=step))

    def _transfer(self, agent: Agent, operation: Operation, source: Backend, target: Backend) -> None:
        engine, row = self._engine, agent.row
        progress = engine.progress(agent, operation)
        policy = engine.specs.policy(row.app)
        spec = engine.specs.spec(row)
        self._step(agent, operation, "checking")
        target.guard.check(deadline=Deadline(60))
        target.prepare(spec.app, seconds=policy.prepare_timeout, progress=progress)
        old = agent.handle
        self._step(agent, operation, "stopping")
        if old is not None:
            source.guard.stop(
                old, grace=policy.stop_grace, deadline=Deadline(policy.stop_grace + 30), progress=progress
            )
        exports = Capability.OWN_DATA in source.capabilities and old is not None
        imports = Capability.OWN_DATA in target.capabilities
        directory = self._data.data_dir(row.name)
        if exports and old is not None:
            self._step(agent, operation, "exporting")
            directory = self._data.fresh(row.name, SCRATCH)
            source.guard.export_data(old, directory, deadline=Deadline(TRANSFER), progress=progress)
        handle = target.guard.handle(spec)
        imports = imports and exists(directory)
        if imports:
            self._bring(agent, operation, target, handle, directory)
        self._step(agent, operation, "handing over")
        self._hand_over(agent, operation, handle, exports=exports, imports=imports)
        if old is not None:
            try:  # what is left there is a shell without a use; a backend that is away keeps it, stopped
                source.guard.destroy(old, data=False, deadline=Deadline(300), progress=progress)
            except DispatcherError as error:
                _log.warning("%s: what is left on %s: %s", printable(row.name), source.name, error)

    def _bring(self, agent: Agent, operation: Operation, target: Backend, handle: Handle, directory: Path) -> None:
        """Import into the target, and export again to see that everything arrived."""
        engine, row = self._engine, agent.row
        progress = engine.progress(agent, operation)

        def tick() -> None:
            progress(operation.stage)

        self._save_older_copy(agent, operation, target)
        self._step(agent, operation, "importing")
        if row.move:
            engine.update(agent, operation, move=dataclasses.replace(row.move, handle=handle.to_json()))
        target.guard.import_data(handle, directory, deadline=Deadline(TRANSFER), progress=progress)
        self._step(agent, operation, "verifying")
        check = self._data.fresh(row.name, CHECK)
        target.guard.export_data(handle, check, deadline=Deadline(TRANSFER), progress=progress)
        wrong = differences(manifest(directory, tick), manifest(check, tick))
        remove_tree(check, deadline=Deadline(TRANSFER))
        if wrong:
            raise ProviderError(
                f"The data did not arrive whole on {target.name}",
                why="; ".join(wrong),
                fix="mend what it names (chown, for another owner) and start the agent again, or set the app's "
                "provider back; the old data is untouched",
            )

    def _hand_over(
        self, agent: Agent, operation: Operation, handle: Handle, *, exports: bool, imports: bool
    ) -> None:
        """Make the agent the target's, in one transaction with the record of the old copy."""
        engine = self._engine
        now = engine.clock.now()
        with agent.lock:
            operation.check()
            row = agent.row
            move = row.move
            if move is None:
                raise RuntimeError("a move that is handed over has begun")
            copy = f"{int(now)}-{move.source}" if imports and not exports else ""
            settled = dataclasses.replace(
                row,
                version=row.version + 1,
                provider=move.target,
                handle=handle.to_json(),
                observed=BackendState.ABSENT,
                spec_hash="",
                endpoint="",
                move=dataclasses.replace(move, settling=True, copy=copy, install=exports and not imports),
            )
            event = engine.event(row, "moved", f"from {move.source} to {move.target}")
            if exports or copy:
                kept = CopyRow(
                    id=0,
                    agent=row.name,
                    provider=move.source,
                    directory=copy,
                    handle="" if copy else row.handle,
                    time=now,
                )
                engine.store.add_copy(kept, settled, [(row.id, event)])
            else:
                engine.store.save([settled], [(row.id, event)])
            agent.row = settled
        engine.history.tell([event])

    def _save_older_copy(self, agent: Agent, operation: Operation, target: Backend) -> None:
        """Export what the target still holds of an earlier move: what is imported now would replace it."""
        for copy in self._engine.store.copies(agent.row.name):
            if copy.provider == target.name and not copy.directory:
                self._step(agent, operation, "saving an older copy")
                name = f"{int(copy.time)}-{copy.provider}"
                directory = self._data.fresh(agent.row.name, f"copies/{name}")
                target.guard.export_data(
                    Handle.from_json(copy.handle),
                    directory,
                    deadline=Deadline(TRANSFER),
                    progress=self._engine.progress(agent, operation),
                )
                self._engine.store.set_copy_directory(copy.id, name)

    def abandon(self, agent: Agent) -> None:
        """Remove what a move that came to nothing left at its target and beside the data."""
        row, move = agent.row, agent.row.move
        if move is None or move.settling:
            return
        try:
            for name in (SCRATCH, CHECK):
                remove_tree(self._data.paths.agent_dir(row.name) / name, deadline=Deadline(TRANSFER))
            if move.handle:
                self._engine.backends.get(move.target).guard.destroy(
                    Handle.from_json(move.handle), data=True, deadline=Deadline(300), progress=_unwatched
                )
        except (OSError, DispatcherError) as error:
            _log.warning("%s: what a failed move left: %s", printable(row.name), error)


_DONE = {"move": None, "failure": None, "retry_at": None}


def _unwatched(step: str, detail: str = "", fraction: float | None = None) -> None:
    """Progress of cleaning up, which is not cancelled."""
