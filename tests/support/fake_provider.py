"""The reference provider of the kit: agents in memory, with every capability, and faults on demand.

For the kit's own tests and for tests of code that calls providers::

    plugins.register("fake", tests.support.fake_provider)
    backend = FakeBackend.named("default")
    backend.inject("ensure", agent="alice", delay=2)      # or hang=True, error=..., result=...

Agents answer HTTP on a loopback port (or, by `endpoint = "unix"`, on `spec.socket`): 200 on every health path
`/`.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DeadlineExceeded, NotFound, ProviderError, SpecConflict, Unavailable
from dispatcher.plugin.hooks import hookimpl
from dispatcher.plugin.model import (
    AgentSpec,
    App,
    BackendState,
    Capability,
    Depth,
    Endpoint,
    Finding,
    Handle,
    Isolation,
    Level,
    Observation,
    Usage,
)
from dispatcher.plugin.provider import Closeable, Progress, Provider, ProviderContext, no_progress
from tests.support.fake_app import FakeApp
from tests.support.fake_backend import (
    Container,
    EngineDown,
    EngineError,
    EngineTimeout,
    FakeBackend,
    NoSuchThing,
)

__all__ = ["FakeAppOptions", "FakeBackend", "FakeOptions", "FakeProvider", "dispatcher_register_providers"]

_F = TypeVar("_F", bound=Callable[..., Any])
_STATES = {
    "running": BackendState.RUNNING,
    "paused": BackendState.SUSPENDED,
    "saved": BackendState.HIBERNATED,
    "exited": BackendState.STOPPED,
}

_LIMITS = {
    "memory": Capability.MEMORY_LIMIT,
    "cpus": Capability.CPU_LIMIT,
    "pids": Capability.PIDS_LIMIT,
    "disk": Capability.DISK_LIMIT,
}


def contained(needed: Capability | None = None, *, calls: bool = True) -> Callable[[_F], _F]:
    """Wrap a contract method: check the capability, inject faults, call the backend, translate its errors.

    :param needed: the capability that it needs; :param calls: whether it makes a round trip to the backend.
    """

    def wrap(method: _F) -> _F:
        @functools.wraps(method)
        def wrapped(self: FakeProvider, *arguments: Any, deadline: Deadline, **named: Any) -> Any:
            if needed is not None:
                self.need(needed)
            agent = getattr(arguments[0], "agent", "") if arguments else ""
            progress = named.get("progress", no_progress)
            with translated():
                self.backend.fault(method.__name__, agent, deadline, progress)
                if calls:
                    self.backend.round_trip(deadline)
                result = method(self, *arguments, deadline=deadline, **named)
                return self.backend.fault(method.__name__, agent, deadline, progress, result, after=True)

        return cast("_F", wrapped)

    return wrap


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Translate the backend's errors into those of the contract."""
    try:
        yield
    except EngineTimeout as error:
        raise DeadlineExceeded(
            "The backend did not answer in time", why=str(error), fix="check whether it is overloaded"
        ) from error
    except EngineDown as error:
        raise Unavailable("The backend does not answer", why=str(error), fix="start it") from error
    except NoSuchThing as error:
        raise NotFound("The agent does not exist", why=str(error), fix="start it") from error
    except EngineError as error:
        raise ProviderError("The backend refused", why=str(error), fix="read its log") from error


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FakeOptions(_Strict):
    """``[providers.fake]``: name of the simulated backend."""

    backend: str = "default"


class FakeAppOptions(_Strict):
    """``[apps.X.fake]``: `image` "missing" does not exist; `endpoint` "none" starts no server."""

    image: str = "probe"
    endpoint: Literal["tcp", "unix", "none"] = "tcp"
    arguments: list[str] = []


class FakeProvider(Provider):
    """Keeps agents in a `FakeBackend`."""

    name = "fake"
    isolation = Isolation.CONTAINER
    Options: ClassVar[type[BaseModel]] = FakeOptions
    AppOptions: ClassVar[type[BaseModel]] = FakeAppOptions

    def __init__(self, *, context: ProviderContext, options: BaseModel) -> None:
        super().__init__(context=context, options=options)
        assert isinstance(options, FakeOptions)
        self.backend = FakeBackend.named(options.backend)
        self._watches: list[Closeable] = []

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self.backend.capabilities

    @contained()
    def check(self, *, deadline: Deadline) -> None:
        """One round trip is all there is to check."""

    def explain(self, app: App | None) -> Sequence[Finding]:
        what = f"the app {app.name}" if app else "the backend"
        return [Finding(level=Level.INFO, what=f"Everything about {what} is simulated, in this process")]

    @contained()
    def prepare(self, app: App, *, deadline: Deadline, progress: Progress) -> None:
        progress("looking for the image")
        self.image(app)

    def handle(self, spec: AgentSpec) -> Handle:
        return Handle(provider=self.name, agent=spec.agent, name=spec.backend_name)

    @contained()
    def ensure(self, spec: AgentSpec, *, deadline: Deadline, progress: Progress) -> Handle:
        handle = self.handle(spec)
        progress("looking")
        self.image(spec.app)
        self.refuse_undeclared(spec.app)
        known = self.backend.containers.get(handle.name)
        if known and known.state != "exited":
            if known.labels["hash"] != spec.hash:
                raise SpecConflict(f"{spec.agent} exists with another specification", fix="stop it first")
            self.wake(known)
        else:
            self.create(spec, handle, known, deadline, progress)
        return handle

    def create(
        self, spec: AgentSpec, handle: Handle, known: Container | None, deadline: Deadline, progress: Progress
    ) -> None:
        """Make and run a container; take it away again when that is cancelled."""
        fresh = handle.name not in self.backend.volumes
        container = self.container(spec, handle)
        try:
            progress("creating")
            self.backend.round_trip(deadline)
            with self.backend.lock:
                self.backend.containers[handle.name] = container
            container.app.run()
            progress("started")
        except BaseException:
            container.app.end()
            with self.backend.lock:
                self.backend.containers.pop(handle.name, None)
                if known:
                    self.backend.containers[handle.name] = known
                volume = self.backend.volumes.pop(handle.name, None) if fresh else None
            if volume:
                shutil.rmtree(volume, ignore_errors=True)
            raise

    def container(self, spec: AgentSpec, handle: Handle) -> Container:
        """Return the container that a spec describes, not yet running."""
        options = spec.app.options
        assert isinstance(options, FakeAppOptions)
        endpoint = {"tcp": Endpoint.tcp("127.0.0.1", 0), "unix": Endpoint.unix(spec.socket)}.get(options.endpoint)
        app = FakeApp(
            spec,
            endpoint=endpoint,
            environment=self.environment(spec),
            arguments=[self.fill(word, spec) for word in options.arguments],
            data=self.own_data(handle) if Capability.OWN_DATA in self.capabilities else spec.data_dir,
        )
        labels = {"installation": spec.installation, "agent": spec.agent, "hash": spec.hash}
        container = Container(name=handle.name, labels=labels, app=app, started_at=time.time())
        app.log, app.on_exit = container.log.append, partial(self.backend.died, handle.name)
        return container

    def environment(self, spec: AgentSpec) -> dict[str, str]:
        """Return what the app finds in its environment."""
        data = str(spec.data_dir)
        own = {name: self.fill(value, spec) for name, value in spec.app.environment.items()}
        return {**own, "HOME": data, **spec.variables(data, "/run/secrets")}

    def fill(self, text: str, spec: AgentSpec) -> str:
        """Replace placeholders."""
        return text.replace("{data}", str(spec.data_dir)).replace("{socket}", str(spec.socket))

    @contained()
    def observe(self, handle: Handle, *, deadline: Deadline) -> Observation:
        known = self.backend.containers.get(handle.name)
        return self.observation(known) if known else Observation(state=BackendState.ABSENT)

    def observation(self, known: Container) -> Observation:
        """Return how a container is."""
        state = _STATES[known.state]
        awake = state in {BackendState.RUNNING, BackendState.SUSPENDED}
        return Observation(
            state=state,
            endpoint=known.app.endpoint if awake else None,
            started_at=known.started_at,
            spec_hash=known.labels["hash"],
            exit_reason=known.exit_reason,
            oom_kills=known.oom_kills,
        )

    @contained()
    def listeners(self, handle: Handle, *, deadline: Deadline) -> Sequence[str]:
        known = self.backend.containers.get(handle.name)
        return known.listeners if known else ()

    @contained()
    def stop(self, handle: Handle, *, grace: float, deadline: Deadline, progress: Progress) -> None:
        progress("stopping")
        known = self.backend.containers.get(handle.name)
        if known:
            if known.state == "running" and grace > 0 and not known.app.terminate():
                self.wait(grace, deadline, progress)
            known.app.end()
            known.state = "exited"

    def wait(self, grace: float, deadline: Deadline, progress: Progress) -> None:
        """Wait for an app that has got its signal and does not end."""
        until = Deadline(grace)
        while not until.expired:
            if deadline.expired:
                raise EngineTimeout("the app does not end")
            progress("stopping")
            time.sleep(min(0.1, until.remaining(), max(0.001, deadline.remaining())))

    @contained()
    def destroy(self, handle: Handle, *, data: bool, deadline: Deadline, progress: Progress) -> None:
        progress("removing")
        with self.backend.lock:
            known = self.backend.containers.pop(handle.name, None)
        if known:
            known.app.end()
        if data and (volume := self.backend.volumes.pop(handle.name, None)):
            shutil.rmtree(volume, ignore_errors=True)

    @contained()
    def list(self, *, deadline: Deadline) -> Iterable[tuple[Handle, Observation]]:
        with self.backend.lock:
            known = list(self.backend.containers.values())
        return [(self.found(one), self.observation(one)) for one in known if self.is_ours(one)]

    def is_ours(self, known: Container) -> bool:
        """Whether a container belongs to this installation."""
        return known.labels["installation"] == self.context.installation

    def found(self, known: Container) -> Handle:
        """Return the handle of a container that `list` found."""
        return Handle(provider=self.name, agent=known.labels["agent"], name=known.name)

    @contained()
    def suspend(self, handle: Handle, *, depth: Depth, deadline: Deadline, progress: Progress) -> None:
        self.need(Capability.SUSPEND if depth is Depth.RAM else Capability.HIBERNATE)
        known = self.backend.get(handle.name)
        if known.state != "exited":
            known.app.awake.clear()
            known.state = "paused" if depth is Depth.RAM else "saved"

    @contained()
    def resume(self, handle: Handle, *, deadline: Deadline, progress: Progress) -> None:
        if not self.capabilities & {Capability.SUSPEND, Capability.HIBERNATE}:
            raise self.unsupported(Capability.SUSPEND)
        known = self.backend.get(handle.name)
        if known.state == "exited":
            raise NotFound(f"{handle.agent} does not run any more", fix="start it")
        self.wake(known)

    def wake(self, known: Container) -> None:
        """Resume a suspended container."""
        known.app.awake.set()
        known.state = "running"

    @contained(Capability.LOGS, calls=False)
    def logs(self, handle: Handle, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
        known = self.backend.containers.get(handle.name)
        return self.lines(known, tail, deadline if follow else None)

    @staticmethod
    def lines(known: Container | None, tail: int, follow: Deadline | None) -> Iterator[bytes]:
        """Yield the last lines, then new ones."""
        lines = list(known.log) if known else []
        seen = max(0, len(lines) - tail)
        while True:
            yield from (line[:65_536] for line in lines[seen:])
            if not (known and follow and not follow.expired and known.state == "running"):
                return
            seen = len(lines)
            time.sleep(0.02)
            lines = list(known.log)

    @contained(Capability.USAGE)
    def usage(self, handles: Sequence[Handle], *, deadline: Deadline) -> Mapping[str, Usage]:
        known = {handle.name: self.backend.containers.get(handle.name) for handle in handles}
        return {
            name: Usage(memory=one.app.memory, cpu_seconds=one.app.cpu_seconds)
            for name, one in known.items()
            if one and one.state != "exited"
        }

    def watch(self, on_change: Callable[[str], None]) -> Closeable:
        self.need(Capability.EVENTS)
        watch = self.backend.watch(on_change)
        self._watches.append(watch)
        return watch

    @contained(Capability.OWN_DATA)
    def export_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        copy(self.own_data(handle), directory)

    @contained(Capability.OWN_DATA)
    def import_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        own = self.own_data(handle)
        shutil.rmtree(own)
        own.mkdir()
        copy(directory, own)

    def close(self) -> None:
        while self._watches:
            self._watches.pop().close()

    # -- in one place ------------------------------------------------------------------------------------

    def need(self, capability: Capability) -> None:
        """Raise `Unsupported` unless the capability is declared."""
        if capability not in self.capabilities:
            raise self.unsupported(capability)

    def refuse_undeclared(self, app: App) -> None:
        """Refuse what an app wants and this provider does not declare."""
        self.need(Capability(f"network-{app.network.value}"))
        for key, capability in _LIMITS.items():
            if getattr(app.limits, key) is not None:
                self.need(capability)
        if app.credentials == "stdin":
            self.need(Capability.CREDENTIALS)

    def image(self, app: App) -> None:
        """Refuse the image that does not exist."""
        assert isinstance(app.options, FakeAppOptions)
        if app.options.image == "missing":
            raise ProviderError(
                "There is no image 'missing'", fix=f"set apps.{app.name}.fake.image to another one"
            )

    def own_data(self, handle: Handle) -> Path:
        """Return the backend's own directory for an agent's data."""
        with self.backend.lock:
            if handle.name not in self.backend.volumes:
                self.backend.volumes[handle.name] = Path(tempfile.mkdtemp(prefix="fake-volume-"))
            return self.backend.volumes[handle.name]


def copy(source: Path, target: Path) -> None:
    """Copy a tree with owners, modes, times and links, hard ones too."""
    subprocess.run(["cp", "-a", f"{source}/.", str(target)], check=True)


@hookimpl
def dispatcher_register_providers() -> Iterable[type[Provider]]:
    """Register the reference provider under the name `fake`."""
    return [FakeProvider]
