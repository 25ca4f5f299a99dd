"""The provider itself: what each method of the contract means for containers.  Touches the engine and run_dir."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from dispatcher.plugin import (
    AgentSpec,
    App,
    BackendState,
    Capability,
    Closeable,
    ConfigError,
    Deadline,
    Depth,
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
    Unsupported,
    Usage,
)
from dispatcher_docker import containers, logs, observing, runs, walls
from dispatcher_docker.endings import Endings
from dispatcher_docker.engine import Engine, as_numbers
from dispatcher_docker.events import Watch
from dispatcher_docker.images import Images
from dispatcher_docker.networks import Networks
from dispatcher_docker.options import DockerAppOptions, DockerOptions
from dispatcher_docker.starting import Starts
from dispatcher_docker.thisside import ThisSide
from dispatcher_docker.usage import CgroupUsage, EngineUsage
from dispatcher_docker.volumes import Volumes

_OLDEST_API = (1, 41)


class DockerProvider(Provider):
    """Isolates agents as containers."""

    name = "docker"
    isolation = Isolation.CONTAINER
    Options: ClassVar[type[BaseModel]] = DockerOptions
    AppOptions: ClassVar[type[BaseModel]] = DockerAppOptions

    def __init__(self, *, context: ProviderContext, options: BaseModel) -> None:
        super().__init__(context=context, options=options)
        assert isinstance(options, DockerOptions)
        self._options = options
        self._engine = Engine(options, context.run_dir)
        self._images = Images(self._engine, options, context.installation)
        self._networks = Networks(self._engine, context)
        self._here = ThisSide(self._engine, context)
        self._volumes = Volumes(self._engine, context.installation, privileged=context.privileged)
        self._own_volume = options.data == "volume" or (options.data == "auto" and not self._engine.is_local)
        self._reach = options.reach or ("" if self._engine.is_local else options.publish)
        self._endings = Endings(self._engine, context.state_dir)
        self._starts = Starts(
            self._engine,
            options,
            context.installation,
            here=self._here,
            endings=self._endings,
            volumes=self._volumes if self._own_volume else None,
        )
        self._cgroups = CgroupUsage()
        self._statistics = EngineUsage(self._engine, options.usage_cache)
        self._info: dict[str, Any] | None = None
        self._watches: list[Watch] = []

    # -- the backend -------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> frozenset[Capability]:
        info = self._info or {}
        found = {
            Capability.SUSPEND,
            Capability.LOGS,
            Capability.USAGE,
            Capability.EVENTS,
            Capability.CREDENTIALS,
            Capability.NETWORK_PRIVATE,
        }
        if self._engine.is_local:
            found |= {Capability.NETWORK_NONE, Capability.NETWORK_HOST}
        if self._own_volume:
            found.add(Capability.OWN_DATA)
        for key, capability in (
            ("MemoryLimit", Capability.MEMORY_LIMIT),
            ("CPUCfsQuota", Capability.CPU_LIMIT),
            ("PidsLimit", Capability.PIDS_LIMIT),
        ):
            if info.get(key, True):
                found.add(capability)
        return frozenset(found)

    @property
    def _remapped(self) -> bool:
        return "name=userns" in ((self._info or {}).get("SecurityOptions") or [])

    def check(self, *, deadline: Deadline) -> None:
        with self._engine.call("tell about itself", deadline) as client:
            info: dict[str, Any] = client.info()
            version = str(client.api_version)
        if as_numbers(version) < _OLDEST_API:
            raise ProviderError(
                f"The Docker engine speaks version {version} of its interface",
                why="at least 1.41 is needed",
                fix="install Docker 20.10 or later",
            )
        if info.get("OSType") != "linux":
            raise ProviderError(f"The Docker engine runs {info.get('OSType')} containers", fix="use one for Linux")
        if "name=rootless" in (info.get("SecurityOptions") or []):
            raise ProviderError(
                "The Docker engine is rootless",
                why="agents could not have user ids of their own in it",
                fix="set url in [providers.docker] to the system's engine, or use the provider subprocess",
            )
        self._info = info
        if self._options.data == "bind" and not self._engine.is_local:
            raise ConfigError(
                "providers.docker.data cannot be bind here",
                why=f"{self._engine.url} is an engine on another host, which does not see this host's files",
                fix='set data = "volume", or local = true if the engine does run here',
            )

    def explain(self, app: App | None) -> Sequence[Finding]:
        if app is not None:
            return list(walls.explain_app(app, self._engine, self.context))
        return list(
            walls.explain_backend(
                self._engine,
                self._options,
                self._info,
                own_volume=self._own_volume,
                protects_host=self._networks.can_protect_host,
            )
        )

    def prepare(self, app: App, *, deadline: Deadline, progress: Progress) -> None:
        walls.refuse(app, self._engine, self.context, self.capabilities)
        self._images.prepare(app, deadline=deadline, progress=progress)

    # -- agents ------------------------------------------------------------------------------------------

    def handle(self, spec: AgentSpec) -> Handle:
        return containers.handle_of(spec)

    def ensure(self, spec: AgentSpec, *, deadline: Deadline, progress: Progress) -> Handle:
        handle = self.handle(spec)
        if self._info is None:
            self.check(deadline=deadline)
        walls.refuse(spec.app, self._engine, self.context, self.capabilities)
        if spec.secrets and not self._engine.is_local:
            raise Unsupported(
                f"{spec.agent} cannot be given its secrets",
                why="the engine is on another host, where nothing can be put into memory for it",
                fix='use credentials = "stdin", or an engine on this host',
            )
        progress("looking for the container")
        found = self._starts.find(handle, deadline)
        if found and runs.status(found) in runs.ALIVE:
            if observing.label(found["Config"].get("Labels"), "hash") != spec.hash:
                raise SpecConflict(
                    f"{spec.agent} runs with another specification",
                    why="its app's configuration has changed since it was started",
                    fix=f"dispatcher restart {spec.agent}",
                )
            if runs.status(found) == "paused":
                self.resume(handle, deadline=deadline, progress=progress)
            return handle
        image = self._images.resolve(spec.app, deadline=deadline, progress=progress)
        private = spec.app.network.value == "private" and not containers.options_of(spec.app).network
        with self._networks.in_use(deadline) if private else contextlib.nullcontext():
            self._starts.run(
                spec, handle, found, image=image, remapped=self._remapped, deadline=deadline, progress=progress
            )
        return handle

    def observe(self, handle: Handle, *, deadline: Deadline) -> Observation:
        found = runs.inspect(self._engine, handle.name, deadline)
        if found is None or not self._starts.is_ours(found):
            return Observation(state=BackendState.ABSENT)
        labels = found["Config"].get("Labels")
        current = self._images.meaning(observing.label(labels, "image"))
        seen = observing.from_inspection(found, reach=self._reach, current_image=current)
        seen = self._endpoint_here(handle, seen, deadline)
        if seen.state is BackendState.STOPPED:
            return self._endings.complete(handle, found["Id"], seen, deadline)
        return seen

    def stop(self, handle: Handle, *, grace: float, deadline: Deadline, progress: Progress) -> None:
        progress("looking for the container")
        found = runs.inspect(self._engine, handle.name, deadline)
        if found and self._starts.is_ours(found) and runs.status(found) in runs.ALIVE:
            self._endings.note_stop(handle, found["Id"])
            runs.end(self._engine, found, grace=grace, deadline=deadline, progress=progress)
        self._here.clear(handle, deadline)

    def destroy(self, handle: Handle, *, data: bool, deadline: Deadline, progress: Progress) -> None:
        progress("looking for the container")
        found = runs.inspect(self._engine, handle.name, deadline)
        if found and self._starts.is_ours(found):
            progress("removing the container")
            runs.remove(self._engine, handle.name, deadline)
            self._networks.remove_unused(deadline)
        self._here.clear(handle, deadline)
        self._endings.forget(handle)
        if self._own_volume:
            self._volumes.remove_helper(handle, deadline)
        if data and self._own_volume:
            progress("removing the data volume")
            self._volumes.remove(handle, deadline)

    def list(self, *, deadline: Deadline) -> Iterable[tuple[Handle, Observation]]:
        with self._engine.call("list the containers", deadline) as client:
            label = f"{containers.LABEL}installation={self.context.installation}"
            found = client.containers(all=True, filters={"label": [label]})
        for one in found:
            self._images.meaning(observing.label(one.get("Labels"), "image"))
        if found:
            self._images.look_up_all(deadline)
        alive, ended = [], []
        for one in found:
            handle = observing.handle_from(one.get("Labels"))
            if handle is None or f"/{handle.name}" not in (one.get("Names") or ()):
                continue
            current = self._images.meaning(observing.label(one.get("Labels"), "image"))
            seen = observing.from_summary(one, reach=self._reach, current_image=current)
            if seen.state is BackendState.STOPPED:
                ended.append((handle, str(one["Id"]), seen))
            else:
                alive.append((handle, self._endpoint_here(handle, seen, deadline)))
        whys = self._endings.complete_many(ended, deadline)
        return alive + [(handle, seen) for (handle, _, _), seen in zip(ended, whys, strict=True)]

    def _endpoint_here(self, handle: Handle, seen: Observation, deadline: Deadline) -> Observation:
        tunnel = self._engine.tunnel
        return tunnel.forward(handle, seen, deadline) if tunnel else seen

    # -- capabilities ------------------------------------------------------------------------------------

    def suspend(self, handle: Handle, *, depth: Depth, deadline: Deadline, progress: Progress) -> None:
        if depth is Depth.DISK:
            raise self.unsupported(Capability.HIBERNATE)
        progress("pausing the container")
        try:
            runs.pause(self._engine, handle.name, deadline)
        except ProviderError as error:
            found = runs.inspect(self._engine, handle.name, deadline)
            if found is None or runs.status(found) not in runs.ALIVE:
                raise NotFound(f"{handle.agent} does not run", fix="start it") from error
            if runs.status(found) != "paused":
                raise

    def resume(self, handle: Handle, *, deadline: Deadline, progress: Progress) -> None:
        progress("unpausing the container")
        try:
            runs.unpause(self._engine, handle.name, deadline)
        except ProviderError as error:
            found = runs.inspect(self._engine, handle.name, deadline)
            if found is None or runs.status(found) not in runs.ALIVE:
                raise NotFound(f"{handle.agent} does not run any more", fix="start it") from error
            if runs.status(found) == "paused":
                raise

    def logs(self, handle: Handle, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
        if follow:
            return logs.follow(self._engine, handle.name, tail=tail, deadline=deadline)
        return iter(logs.read(self._engine, handle.name, tail=tail, deadline=deadline))

    def usage(self, handles: Sequence[Handle], *, deadline: Deadline) -> Mapping[str, Usage]:
        wanted = {f"/{handle.name}": handle.name for handle in handles}
        if not wanted:
            return {}
        with self._engine.call("list the containers", deadline) as client:
            label = f"{containers.LABEL}installation={self.context.installation}"
            found = client.containers(filters={"label": [label]})
        ids = {one["Id"]: wanted[name] for one in found for name in one.get("Names") or () if name in wanted}
        if not self._engine.is_local:
            return {ids[one]: usage for one, usage in self._statistics.read(ids, deadline).items()}
        self._cgroups.forget(one["Id"] for one in found)
        usages = {}
        for container, name in ids.items():
            if not self._cgroups.knows(container) and not self._cgroups.guess(container):
                inspected = runs.inspect(self._engine, container, deadline)
                if inspected:
                    self._cgroups.learn(container, int(inspected["State"].get("Pid") or 0))
            if usage := self._cgroups.read(container):
                usages[name] = usage
        return usages

    def watch(self, on_change: Callable[[str], None]) -> Closeable:
        watch = Watch(self._engine, self.context.installation, on_change, self.context.log)
        self._watches.append(watch)
        return watch

    def export_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        self._need_own_data()
        self._volumes.export(handle, directory, deadline, progress)

    def import_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        self._need_own_data()
        self._volumes.replace(handle, directory, deadline, progress)

    def _need_own_data(self) -> None:
        if not self._own_volume:
            raise self.unsupported(Capability.OWN_DATA)

    def close(self) -> None:
        while self._watches:
            self._watches.pop().close()
        self._engine.close()
