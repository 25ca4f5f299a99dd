"""The provider `subprocess`: the contract's methods, put together from this package's parts.

An agent is a process tree in a bubblewrap sandbox.  What is known of it is its journal (record.py) and what the
kernel says; nothing that matters is kept in this process, so that a fresh instance takes over at any moment.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel

from dispatcher.plugin import (
    API_VERSION,
    AgentSpec,
    App,
    BackendState,
    Capability,
    Closeable,
    Deadline,
    Depth,
    DispatcherError,
    Endpoint,
    Finding,
    Handle,
    Isolation,
    NotFound,
    Observation,
    Progress,
    Provider,
    ProviderContext,
    ProviderError,
    SpecConflict,
    Usage,
)
from dispatcher_subprocess import explain, output, processes, procfs
from dispatcher_subprocess.attempt import Attempt
from dispatcher_subprocess.ending import Ending, gone
from dispatcher_subprocess.listeners import NOT_YET, Verified, listening
from dispatcher_subprocess.machine import Machine, examine, verify
from dispatcher_subprocess.options import AppOptions as PerAppOptions
from dispatcher_subprocess.options import Options as BackendOptions
from dispatcher_subprocess.planning import Planner
from dispatcher_subprocess.pumping import PumpClient
from dispatcher_subprocess.record import Journals, Record
from dispatcher_subprocess.secretfiles import SecretFiles
from dispatcher_subprocess.sleeping import Sleeping
from dispatcher_subprocess.watcher import Subscription, Watcher

_EXAMINE = 30.0  # seconds for the first look at the host
_SETTLE = 1.0  # seconds that an observation waits for somebody who tidies up


class SubprocessProvider(Provider):
    """Agents as sandboxed processes of this host."""

    name: ClassVar[str] = "subprocess"
    api_version: ClassVar[int] = API_VERSION
    isolation: ClassVar[Isolation] = Isolation.PROCESS
    Options: ClassVar[type[BaseModel]] = BackendOptions
    AppOptions: ClassVar[type[BaseModel]] = PerAppOptions

    def __init__(self, *, context: ProviderContext, options: BaseModel) -> None:
        super().__init__(context=context, options=options)
        assert isinstance(options, BackendOptions)
        self._options = options
        self._lock = threading.Lock()
        self._known: _Parts | None = None
        self._journals = Journals(context.state_dir)
        self._secret_files = SecretFiles(context.installation, context.run_dir)
        self._pump = PumpClient(context.run_dir, options.log_size, options.log_files)
        self._callbacks: list[Callable[[str], None]] = []
        self._watcher: Watcher | None = None
        self._verified = Verified()
        self._handed_over = False

    # --- the backend

    @property
    def capabilities(self) -> frozenset[Capability]:
        return explain.capabilities(self._parts.machine)

    def check(self, *, deadline: Deadline) -> None:
        with self._lock:
            self._known = self._examine(deadline)
            found = self._known.machine
        verify(found, self._options)
        self._journals.prepare()

    def explain(self, app: App | None) -> Sequence[Finding]:
        return explain.findings(self._parts.machine, app)

    def prepare(self, app: App, *, deadline: Deadline, progress: Progress) -> None:
        verify(self._parts.machine, self._options)
        self._parts.planner.verify(app)

    def close(self) -> None:
        with self._lock:
            watcher, self._watcher = self._watcher, None
            known = self._known
        if watcher:
            watcher.close()
        if known:
            known.machine.cgroups.tidy()
        self._pump.close()

    @property
    def _parts(self) -> _Parts:
        """What depends on the host; looked at once, and again by `check`."""
        with self._lock:
            if self._known is None:
                self._known = self._examine(Deadline(_EXAMINE))
            return self._known

    def _examine(self, deadline: Deadline) -> _Parts:
        found = examine(self._options, self.context.installation, deadline)
        if found.reason and (self._known is None or self._known.machine.reason != found.reason):
            self.context.log.warning("agents run without a sandbox: %s", found.reason)
        return _Parts(
            machine=found,
            planner=Planner(self.context, self._options, found, self._secret_files),
            ending=Ending(self._journals, found.cgroups, self._secret_files),
            sleeping=Sleeping(self._journals, found.cgroups),
        )

    # --- one agent

    def handle(self, spec: AgentSpec) -> Handle:
        return Handle(
            provider=self.name, agent=spec.agent, name=spec.backend_name, data={"log_dir": str(spec.log_dir)}
        )

    def ensure(self, spec: AgentSpec, *, deadline: Deadline, progress: Progress) -> Handle:
        handle = self.handle(spec)
        parts = self._parts
        progress("start", "preparing the sandbox")
        verify(parts.machine, self._options)
        self._journals.prepare()
        with self._journals.locked(handle.name, deadline):
            record = self._journals.read(handle.name)
            if record and parts.ending.settle(record).ended is None:
                if record.spec_hash != spec.hash:
                    raise SpecConflict(
                        f"{spec.agent} runs with another specification", fix="stop it first, then start it again"
                    )
                parts.sleeping.resume(record)
            else:
                self._start(parts, spec, deadline, progress)
        return handle

    def _start(self, parts: _Parts, spec: AgentSpec, deadline: Deadline, progress: Progress) -> None:
        attempt = Attempt(
            spec,
            parts.planner.plan(spec, self._taken_ports),
            machine=parts.machine,
            options=self._options,
            journals=self._journals,
            secret_files=self._secret_files,
            attach=self._attach,
            deadline=deadline,
        )
        try:
            attempt.prepare()
            attempt.spawn()
            progress("start", "confining it")
            attempt.confine()
            attempt.release()
        except BaseException as error:
            if isinstance(error, DispatcherError):
                attempt.explain(error)
            attempt.undo()
            raise
        finally:
            attempt.close()
        record = self._journals.read(spec.backend_name)
        if record:
            self._watch(record)

    def observe(self, handle: Handle, *, deadline: Deadline) -> Observation:
        return self._observe(self._journals.read(handle.name))

    def stop(self, handle: Handle, *, grace: float, deadline: Deadline, progress: Progress) -> None:
        with self._journals.locked(handle.name, deadline):
            record = self._journals.read(handle.name)
            if record:
                tick = functools.partial(progress, "stop", "waiting for it to end")
                self._parts.ending.stop(record, grace, deadline, tick)

    def destroy(self, handle: Handle, *, data: bool, deadline: Deadline, progress: Progress) -> None:
        with self._journals.locked(handle.name, deadline):
            record = self._journals.read(handle.name)
            if record:
                tick = functools.partial(progress, "remove", "ending it")
                self._parts.ending.stop(record, 0.0, deadline, tick)
                self._verified.forget(record.token)
            self._parts.ending.forget(handle.name)
            if data and handle.data.get("log_dir"):
                output.remove(output.log_file(handle.data["log_dir"]))

    def suspend(self, handle: Handle, *, depth: Depth, deadline: Deadline, progress: Progress) -> None:
        if depth is not Depth.RAM:
            raise self.unsupported(Capability.HIBERNATE)
        with self._journals.locked(handle.name, deadline):
            progress("suspend", "freezing it")
            self._parts.sleeping.suspend(self._alive(handle), deadline)

    def resume(self, handle: Handle, *, deadline: Deadline, progress: Progress) -> None:
        with self._journals.locked(handle.name, deadline):
            progress("resume", "thawing it")
            self._parts.sleeping.resume(self._alive(handle))

    def _alive(self, handle: Handle) -> Record:
        record = self._journals.read(handle.name)
        if record is None or self._parts.ending.settle(record).ended is not None:
            raise NotFound(f"{handle.agent} does not run", fix="start it")
        return record

    def logs(self, handle: Handle, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
        path = output.log_file(handle.data["log_dir"])
        return output.read_lines(path, tail=tail, follow=follow, deadline=deadline)

    # --- all agents

    def list(self, *, deadline: Deadline) -> Iterable[tuple[Handle, Observation]]:
        found = []
        living = []
        for name in self._journals.names():
            record = self._journals.read(name)
            if record:
                data = {"log_dir": record.log_dir}
                handle = Handle(provider=self.name, agent=record.agent, name=record.name, data=data)
                seen = self._observe(record)
                found.append((handle, seen))
                if seen.state in {BackendState.RUNNING, BackendState.SUSPENDED}:
                    living.append(record)
        if living:
            self._keep_pumping(living)
        return found

    def usage(self, handles: Sequence[Handle], *, deadline: Deadline) -> Mapping[str, Usage]:
        found = {}
        for handle in handles:
            record = self._journals.read(handle.name)
            if record and not gone(record):
                found[handle.name] = processes.usage(record, self._parts.ending.group(record))
        return found

    def watch(self, on_change: Callable[[str], None]) -> Closeable:
        subscription = Subscription(self._callbacks, on_change)
        for name in self._journals.names():
            record = self._journals.read(name)
            if record and record.ended is None:
                self._watch(record)
        return subscription

    # --- inside

    def _observe(self, record: Record | None) -> Observation:
        if record is None:
            return Observation(state=BackendState.ABSENT)
        if record.ended is None and gone(record):
            # Somebody who settles it is done at once; who stops or starts it holds it for longer.
            patience = 0.0 if record.asked or record.main is None else _SETTLE
            with self._journals.try_locked(record.name, patience) as held:
                if not held and record.main is None:
                    return Observation(state=BackendState.STARTING, spec_hash=record.spec_hash)
                if held:
                    fresh = self._journals.read(record.name)
                    if fresh is None:
                        return Observation(state=BackendState.ABSENT)
                    record = self._parts.ending.settle(fresh)
        if gone(record):
            return Observation(
                state=BackendState.STOPPED,
                started_at=record.started_at,
                spec_hash=record.spec_hash,
                exit_reason=record.ended or "",
            )
        asleep = self._parts.sleeping.asleep(record)
        endpoint, detail = self._endpoint(record)
        if record.helper and not procfs.lives(record.helper.pid, record.helper.start):
            detail = "what carried its network has ended: restart it"
        return Observation(
            state=BackendState.SUSPENDED if asleep else BackendState.RUNNING,
            endpoint=endpoint,
            owner_uid=record.owner_uid if endpoint and endpoint.kind == "unix" else None,
            started_at=record.started_at,
            spec_hash=record.spec_hash,
            detail=detail,
        )

    def _endpoint(self, record: Record) -> tuple[Endpoint | None, str]:
        """Return where the agent listens, or None and why that is not known to be the agent."""
        endpoint = Endpoint.parse(record.endpoint)
        if endpoint.kind != "tcp":
            return endpoint, ""
        if record.helper and record.init and not listening(endpoint.port, str(record.init.pid)):
            return None, NOT_YET
        fault = self._verified.fault(record.token, listening(endpoint.port), functools.partial(self._pids, record))
        return (None, fault) if fault else (endpoint, "")

    def _pids(self, record: Record) -> Sequence[int]:
        """Return the processes that may hold an agent's port: its own, or the helper that forwards to it alone."""
        if record.helper:
            return [record.helper.pid]
        return [process.pid for process in processes.members(record, self._parts.ending.group(record))]

    def _taken_ports(self) -> Iterable[int]:
        for name in self._journals.names():
            record = self._journals.read(name)
            if record and record.ended is None:
                yield Endpoint.parse(record.endpoint).port

    def _watch(self, record: Record) -> None:
        with self._lock:
            if self._watcher is None:
                self._watcher = Watcher(self._ended, self._keep_pumping, self.context.log)
                self._watcher.watch_pump(self._pump.fileno())
            watcher = self._watcher
        # bubblewrap's outer process ends after the app; what is seen then is final.
        if record.main and not watcher.add(record.name, record.main):
            app = processes.app_without_main(record)
            if app is None or not watcher.add(record.name, app):
                self._ended(record.name)

    def _ended(self, name: str) -> None:
        """Tidy up after an agent of which a process ended, and tell who watches."""
        with self._journals.try_locked(name) as held:
            record = self._journals.read(name) if held else None
            if record and self._parts.ending.settle(record).ended is not None:
                self._verified.forget(record.token)
            elif record:
                self._watch(record)
        for callback in tuple(self._callbacks):
            callback(name)

    def _attach(self, read_end: int, path: Path) -> None:
        if self._pump.attach(read_end, path):
            self._attach_all(self._living())

    def _keep_pumping(self, living: Iterable[Record] | None = None) -> None:
        """See that the log pump runs and has all output, which a manager may have died before handing over.

        :param living: the records of all agents that live, where they are known already.
        """
        try:
            if self._pump.wake() or not self._handed_over:
                self._attach_all(self._living() if living is None else living)
        except ProviderError as error:
            self.context.log.warning("agents' output is not written to their logs: %s", error)

    def _living(self) -> Iterator[Record]:
        for name in self._journals.names():
            record = self._journals.read(name)
            if record and not gone(record):
                yield record

    def _attach_all(self, living: Iterable[Record]) -> None:
        self._handed_over = True
        if self._watcher:
            self._watcher.watch_pump(self._pump.fileno())
        for record in living:
            fd = processes.output_of(record)
            if fd is not None:
                try:
                    self._pump.attach(fd, output.log_file(record.log_dir))
                finally:
                    os.close(fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What depends on the host."""

    machine: Machine
    planner: Planner
    ending: Ending
    sleeping: Sleeping
