"""The provider `subprocess`: the contract's methods, put together from this package's parts.

An agent is a process tree in a bubblewrap sandbox.  Its state is its journal (journal.py) and the kernel's.  This
process keeps nothing important, so that another instance can take over at any moment.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel

from dispatcher.plugin import (
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
    SecretFiles,
    SpecConflict,
    Usage,
    read_lines,
    remove_logs,
)
from dispatcher_subprocess import explain, logs, network
from dispatcher_subprocess.host import Host, examine, verify
from dispatcher_subprocess.logs import LogCollector
from dispatcher_subprocess.observe import Observer, Watcher, listeners, usage
from dispatcher_subprocess.options import AppOptions as PerAppOptions
from dispatcher_subprocess.options import Options as BackendOptions
from dispatcher_subprocess.plan import Planner
from dispatcher_subprocess.processes.run_record import Journals, Record
from dispatcher_subprocess.start import Start
from dispatcher_subprocess.stop import Stopper

_EXAMINE = 30.0  # seconds to examine the host
_ATTEMPTS = 3  # to pass all pipes to the same log collector


def _secret_places(context: ProviderContext) -> list[Path]:
    """Return where secrets may be, the best place first.

    Agents of a manager that is root can enter /dev/shm, but not its run_dir.  For an ordinary user the run_dir is
    better: logind removes what the user has in /dev/shm at the end of the last login session (RemoveIPC=yes).
    """
    places = [context.run_dir, Path("/dev/shm")]  # noqa: S108
    return places[::-1] if context.privileged else places


class SubprocessProvider(Provider):
    """Agents as sandboxed processes of this host."""

    name: ClassVar[str] = "subprocess"
    isolation: ClassVar[Isolation] = Isolation.PROCESS
    Options: ClassVar[type[BaseModel]] = BackendOptions
    AppOptions: ClassVar[type[BaseModel]] = PerAppOptions

    def __init__(self, *, context: ProviderContext, options: BaseModel) -> None:
        super().__init__(context=context, options=options)
        assert isinstance(options, BackendOptions)
        self._options = options
        self._lock = threading.Lock()
        self._examined: _Parts | None = None
        self._journals = Journals(context.state_dir)
        self._secret_files = SecretFiles(
            f"dispatcher-{context.installation}-secrets-subprocess",
            _secret_places(context),
            mode=0o711,
        )
        self._collector = LogCollector(context.run_dir, options.log_size, options.log_files, self._adopt)
        self._callbacks: list[Callable[[str], None]] = []
        self._watcher: Watcher | None = None
        self._pipes_passed = False
        self._names_passed = True

    # --- the backend

    @property
    def capabilities(self) -> frozenset[Capability]:
        return explain.capabilities(self._parts.host)

    def check(self, *, deadline: Deadline) -> None:
        with self._lock:
            self._examined = self._examine(deadline)
            found = self._examined.host
        verify(found, self._options)
        self._journals.prepare()

    def explain(self, app: App | None) -> Sequence[Finding]:
        return explain.findings(self._parts.host, app)

    def faults(self, app: App) -> Iterable[str]:
        return [str(error) for error in self._parts.planner.faults(app, likely=True)]

    def prepare(self, app: App, *, deadline: Deadline, progress: Progress) -> None:
        self._usable(deadline).planner.verify(app)

    def close(self) -> None:
        with self._lock:
            watcher, self._watcher = self._watcher, None
            known = self._examined
        if watcher:
            watcher.close()
        if known:
            known.host.cgroups.tidy()
        self._collector.close()

    @property
    def _parts(self) -> _Parts:
        """The parts that depend on the host, which is examined once, and again by `check`."""
        with self._lock:
            if self._examined is None:
                self._examined = self._examine(Deadline(_EXAMINE))
            return self._examined

    def _usable(self, deadline: Deadline) -> _Parts:
        """Return the parts for a start; if bubblewrap was not tried, it is now.

        :raises Unavailable, ProviderError: as `verify`.
        """
        parts = self._parts
        if parts.host.untried:
            with self._lock:
                parts = self._examined = self._examine(deadline)
        verify(parts.host, self._options)
        return parts

    def _examine(self, deadline: Deadline) -> _Parts:
        found = examine(self._options, self.context.installation, deadline)
        if (
            found.reason
            and not found.untried
            and (self._examined is None or self._examined.host.reason != found.reason)
        ):
            self.context.log.warning("agents run without a sandbox: %s", found.reason)
        stopper = Stopper(self._journals, found.cgroups, self._secret_files)
        return _Parts(
            host=found,
            planner=Planner(self.context, self._options, found, self._secret_files),
            stopper=stopper,
            observer=Observer(self._journals, stopper),
        )

    # --- one agent

    def handle(self, spec: AgentSpec) -> Handle:
        return Handle(
            provider=self.name, agent=spec.agent, name=spec.backend_name, data={"log_dir": str(spec.log_dir)}
        )

    def ensure(self, spec: AgentSpec, *, deadline: Deadline, progress: Progress) -> Handle:
        handle = self.handle(spec)
        progress("start", "preparing the sandbox")
        parts = self._usable(deadline)
        self._journals.prepare()
        with self._journals.locked(handle.name, deadline):
            record = self._journals.read(handle.name)
            if record and parts.stopper.clean_up(record).ended is None:
                if record.spec_hash != spec.hash:
                    raise SpecConflict(
                        f"{spec.agent} runs with another specification", fix="stop it first, then start it again"
                    )
                parts.stopper.resume(record)
            else:
                self._start(parts, spec, deadline, progress)
        return handle

    def _start(self, parts: _Parts, spec: AgentSpec, deadline: Deadline, progress: Progress) -> None:
        start = Start(
            spec=spec,
            plan=parts.planner.plan(spec, self._taken_ports),
            host=parts.host,
            options=self._options,
            journals=self._journals,
            secret_files=self._secret_files,
            attach=self._attach,
            deadline=deadline,
        )
        try:
            start.prepare()
            start.spawn()
            progress("start", "confining it")
            start.confine()
            start.release()
        except BaseException as error:
            if isinstance(error, DispatcherError):
                start.add_output_to(error)
            start.undo()
            raise
        finally:
            start.close()
        self._watch(start.record)

    def observe(self, handle: Handle, *, deadline: Deadline) -> Observation:
        return self._parts.observer.observe(self._journals.read(handle.name))

    def stop(self, handle: Handle, *, grace: float, deadline: Deadline, progress: Progress) -> None:
        with self._journals.locked(handle.name, deadline):
            record = self._journals.read(handle.name)
            if record:
                on_wait = functools.partial(progress, "stop", "waiting for it to end")
                self._parts.stopper.stop(record, grace, deadline, on_wait)

    def destroy(self, handle: Handle, *, data: bool, deadline: Deadline, progress: Progress) -> None:
        with self._journals.locked(handle.name, deadline):
            record = self._journals.read(handle.name)
            if record:
                on_wait = functools.partial(progress, "remove", "ending it")
                self._parts.stopper.stop(record, 0.0, deadline, on_wait)
                self._parts.observer.forget(record)
            self._parts.stopper.forget(handle.name)
            if data and handle.data.get("log_dir"):
                remove_logs(logs.log_file(handle.data["log_dir"]))

    def suspend(self, handle: Handle, *, depth: Depth, deadline: Deadline, progress: Progress) -> None:
        if depth is not Depth.RAM:
            raise self.unsupported(Capability.HIBERNATE)
        with self._journals.locked(handle.name, deadline):
            progress("suspend", "freezing it")
            self._parts.stopper.suspend(self._checked_running(handle), deadline)

    def resume(self, handle: Handle, *, deadline: Deadline, progress: Progress) -> None:
        with self._journals.locked(handle.name, deadline):
            progress("resume", "thawing it")
            self._parts.stopper.resume(self._checked_running(handle))

    def _checked_running(self, handle: Handle) -> Record:
        record = self._journals.read(handle.name)
        if record is None or self._parts.stopper.clean_up(record).ended is not None:
            raise NotFound(f"{handle.agent} does not run", fix="start it")
        return record

    def logs(self, handle: Handle, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
        path = logs.log_file(handle.data["log_dir"])
        return read_lines(path, tail=tail, follow=follow, deadline=deadline)

    def _taken_ports(self) -> Iterable[int]:
        for record in self._journals.records():
            if record.ended is None:
                yield Endpoint.parse(record.endpoint).port

    # --- all agents

    def list(self, *, deadline: Deadline) -> Iterable[tuple[Handle, Observation]]:
        found = []
        running = []
        for record in self._journals.records():
            data = {"log_dir": record.log_dir}
            handle = Handle(provider=self.name, agent=record.agent, name=record.name, data=data)
            observation = self._parts.observer.observe(record)
            found.append((handle, observation))
            if observation.state in {BackendState.RUNNING, BackendState.SUSPENDED}:
                running.append(record)
        if running:
            self._keep_collecting(running)
        return found

    def usage(self, handles: Sequence[Handle], *, deadline: Deadline) -> Mapping[str, Usage]:
        found = {}
        for handle in handles:
            record = self._journals.read(handle.name)
            if record and not (run := self._parts.stopper.run(record)).gone:
                found[handle.name] = usage(run)
        return found

    def listeners(self, handle: Handle, *, deadline: Deadline) -> Sequence[str]:
        record = self._journals.read(handle.name)
        return listeners(self._parts.stopper.run(record)) if record else ()

    def watch(self, on_change: Callable[[str], None]) -> Closeable:
        self._callbacks.append(on_change)
        subscription = contextlib.ExitStack()
        subscription.callback(self._callbacks.remove, on_change)
        for record in self._journals.records():
            if record.ended is None:
                self._watch(record)
        return subscription

    # --- the log collector and the end of agents

    def _watch(self, record: Record) -> None:
        with self._lock:
            watcher = self._watcher = self._watcher or Watcher(self.context.log)
        self._watch_collector()
        ended = functools.partial(self._ended, record.name)
        # bubblewrap's outer process ends after the app: its end is final.
        if record.main and not watcher.add_process(record.main, ended):
            app = self._parts.stopper.run(record).app_without_main()
            if app is None or not watcher.add_process(app, ended):
                ended()

    def _adopt(self, helper: int) -> None:
        self._parts.host.cgroups.adopt(helper)

    def _watch_collector(self) -> None:
        fd = self._collector.fileno()
        if self._watcher and fd is not None:
            self._watcher.add_connection(fd, self._keep_collecting)

    def _ended(self, name: str) -> None:
        """Clean up after an agent of which a process ended, and call the subscribers."""
        with self._journals.try_locked(name) as held:
            record = self._journals.read(name) if held else None
            if record and self._parts.stopper.clean_up(record).ended is not None:
                self._parts.observer.forget(record)
            elif record:
                self._watch(record)
        for callback in tuple(self._callbacks):
            callback(name)

    def _attach(self, fds: Sequence[int], path: Path) -> None:
        if self._collector.attach(fds, path):
            self._attach_all(self._running(), new=True)
        self._watch_collector()

    def _keep_collecting(self, running: Iterable[Record] | None = None) -> None:
        """Ensure that the log collector runs and has all pipes; an earlier manager may have failed to pass some.

        :param running: the records of all agents that run, if they are known already.
        """
        try:
            new = self._collector.ensure()
            if new or not self._pipes_passed:
                new = new or not self._names_passed
                self._attach_all(self._running() if running is None else running, new=new)
            self._watch_collector()
        except DispatcherError as error:
            self.context.log.warning("agents' output is not written to their logs: %s", error)

    def _running(self) -> Iterator[Record]:
        return (record for record in self._journals.records() if not self._parts.stopper.run(record).gone)

    def _attach_all(self, running: Iterable[Record], *, new: bool) -> None:
        """Pass the pipes of all agents and, to a new collector, the sockets for DNS."""
        records = list(running)
        passed = False
        for _ in range(_ATTEMPTS):
            passed = True
            for record in records:
                try:
                    if self._attach_one(record, new=new):
                        break
                except DispatcherError as error:
                    passed = False
                    self.context.log.warning("%s: its output or its DNS is not passed on: %s", record.agent, error)
            else:
                break
            new, passed = True, False  # another collector needs all again
        self._pipes_passed = passed
        self._names_passed = passed or not new

    def _attach_one(self, record: Record, *, new: bool) -> bool:
        """Pass the pipe of an agent and, to a new collector, its sockets; return whether that was started anew."""
        run = self._parts.stopper.run(record)
        error = None
        fds = [fd for fd in (run.output(),) if fd is not None]
        try:
            if fds and new and record.helper and record.init:
                try:
                    fds += network.name_sockets(self._parts.host, record.init, Deadline(_EXAMINE))
                except ProviderError:
                    pass  # those of an agent that starts exist
                except DispatcherError as late:
                    error = late
            restarted = bool(fds) and self._collector.attach(fds, logs.log_file(record.log_dir))
        finally:
            for fd in fds:
                os.close(fd)
        if error and not restarted:
            raise error
        return restarted


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """The parts that depend on the host."""

    host: Host
    planner: Planner
    stopper: Stopper
    observer: Observer
