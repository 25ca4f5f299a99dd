"""The provider `docker`: the contract's methods, each in terms of containers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
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
    listening_endpoints,
)
from dispatcher_docker import container_config, explain, logs, observe
from dispatcher_docker.data import Volumes
from dispatcher_docker.engine import Engine, as_numbers
from dispatcher_docker.images import Images
from dispatcher_docker.networks import Networks
from dispatcher_docker.observe import Lost, Watch
from dispatcher_docker.options import DockerAppOptions, DockerOptions
from dispatcher_docker.start import Starter
from dispatcher_docker.stop import remove, stop
from dispatcher_docker.usage import EngineUsage, from_cgroup, oom_kills

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
        self._networks = Networks(self._engine, context, options.deny)
        self._reach = options.reach or ("" if self._engine.is_local else options.publish)
        self._starter = Starter(self._engine, options, context)
        self._exit_reasons = self._starter.exit_reasons
        self._lost = Lost(self._engine)
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
        if self._starter.volumes:
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
        with self._engine.call("describe itself", deadline) as client:
            info: dict[str, Any] = client.info()
            version = str(client.api_version)
        if as_numbers(version) < _OLDEST_API:
            raise ProviderError(
                f"The Docker engine has version {version} of its interface",
                why="at least 1.41 is needed",
                fix="install Docker 20.10 or later",
            )
        if info.get("OSType") != "linux":
            raise ProviderError(f"The Docker engine runs {info.get('OSType')} containers", fix="use one for Linux")
        if "name=rootless" in (info.get("SecurityOptions") or []) or info.get(
            "Rootless"
        ):  # the latter is Podman's
            raise ProviderError(
                "The Docker engine is rootless",
                why="its agents cannot have user ids of their own",
                fix="set url in [providers.docker] to the system's engine, or use the provider subprocess",
            )
        self._info = info
        if self._options.data == "bind" and not self._engine.is_local:
            raise ConfigError(
                "providers.docker.data cannot be bind here",
                why=f"the engine {self._engine.url} is on another host and does not see this host's files",
                fix='set data = "volume", or local = true if the engine runs on this host',
            )

    def faults(self, app: App) -> Iterable[str]:
        return explain.faults(app, self._engine, self.context)

    def explain(self, app: App | None) -> Sequence[Finding]:
        if app is not None:
            return list(explain.explain_app(app, self._engine))
        return list(
            explain.explain_backend(
                self._engine,
                self._options,
                self._info,
                own_volume=self._starter.volumes is not None,
                protects_host=self._networks.can_protect,
                bounds_connections=self._networks.bounds(Deadline(10)),
            )
        )

    def prepare(self, app: App, *, deadline: Deadline, progress: Progress) -> None:
        explain.refuse(app, self._engine, self.context, self.capabilities)
        self._images.prepare(app, deadline=deadline, progress=progress)

    # -- agents ------------------------------------------------------------------------------------------

    def handle(self, spec: AgentSpec) -> Handle:
        return container_config.handle_of(spec)

    def ensure(self, spec: AgentSpec, *, deadline: Deadline, progress: Progress) -> Handle:
        handle = self.handle(spec)
        if self._info is None:
            self.check(deadline=deadline)
        explain.refuse(spec.app, self._engine, self.context, self.capabilities)
        spec = replace(spec, app=replace(spec.app, limits=spec.app.limits.enforced(self.capabilities)))
        if spec.secrets and not self._engine.is_local:
            raise Unsupported(
                f"{spec.agent} cannot be given its secrets",
                why="the engine is on another host, whose memory the manager cannot write to",
                fix='use credentials = "stdin", or an engine on this host',
            )
        progress("looking for the container")
        found = self._starter.find(handle, deadline)
        if found and observe.status(found) in observe.ALIVE:
            if observe.label(found["Config"].get("Labels"), "hash") != spec.hash:
                raise SpecConflict(
                    f"{spec.agent} runs with another specification",
                    why="its app's configuration has changed since it was started",
                    fix=f"dispatcher restart {spec.agent}",
                )
            if observe.status(found) == "paused":
                self.resume(handle, deadline=deadline, progress=progress)
            return handle
        image = self._images.resolve(spec.app, deadline=deadline, progress=progress)
        private = spec.app.network.value == "private" and not container_config.options_of(spec.app).network
        with self._networks.in_use(handle.name, deadline) if private else contextlib.nullcontext():
            self._starter.run(
                spec, handle, found, image=image, remapped=self._remapped, deadline=deadline, progress=progress
            )
        return handle

    def observe(self, handle: Handle, *, deadline: Deadline) -> Observation:
        found = self._own(handle, deadline)
        if found is None:
            return Observation(state=BackendState.ABSENT)
        labels = found["Config"].get("Labels")
        current = self._images.last_id(observe.label(labels, "image"))
        observation = observe.from_inspection(
            found, reach=self._reach, current_image=current, podman=self._engine.is_podman
        )
        observation = self._endpoint_here(handle, observation, deadline)
        if observation.state is BackendState.STOPPED:
            return self._exit_reasons.complete(handle, found["Id"], observation, deadline)
        return replace(observation, oom_kills=oom_kills(found["Id"]) if self._engine.is_local else 0)

    def stop(self, handle: Handle, *, grace: float, deadline: Deadline, progress: Progress) -> None:
        progress("looking for the container")
        found = self._own(handle, deadline)
        if found and observe.status(found) in observe.ALIVE:
            self._exit_reasons.note_stop(handle, found["Id"])
            stop(self._engine, found, grace=grace, deadline=deadline, progress=progress)
        self._clear(handle, deadline)

    def destroy(self, handle: Handle, *, data: bool, deadline: Deadline, progress: Progress) -> None:
        progress("looking for the container")
        if self._own(handle, deadline):
            progress("removing the container")
            remove(self._engine, handle.name, deadline)
        self._networks.remove(handle.name, deadline)
        self._clear(handle, deadline)
        self._exit_reasons.forget(handle)
        self._starter.users.remove(handle.name)
        if self._starter.volumes:
            self._starter.volumes.remove_helper(handle, deadline)
            if data:
                progress("removing the data volume")
                self._starter.volumes.remove(handle, deadline)

    def list(self, *, deadline: Deadline) -> Iterable[tuple[Handle, Observation]]:
        found = self._engine.containers(self.context.installation, deadline, all=True)
        self._lost.mark(found, deadline)
        modes = ((one.get("HostConfig") or {}).get("NetworkMode") or "" for one in found)
        if any(mode.startswith(container_config.network_name(self.context.installation)) for mode in modes):
            try:
                self._networks.protect(deadline)
            except ProviderError as error:
                self.context.log.warning("%s", error)
        self._images.look_up_all({observe.label(one.get("Labels"), "image") for one in found}, deadline)
        alive, ended = [], []
        for one in found:
            handle = observe.handle_from(one.get("Labels"))
            if handle is None or f"/{handle.name}" not in (one.get("Names") or ()):
                continue
            current = self._images.last_id(observe.label(one.get("Labels"), "image"))
            observation = observe.from_summary(one, reach=self._reach, current_image=current)
            if observation.state is BackendState.STOPPED:
                ended.append((handle, str(one["Id"]), observation))
            else:
                alive.append((handle, self._endpoint_here(handle, observation, deadline)))
        return [*alive, *self._exit_reasons.complete_many(ended, deadline)]

    def _endpoint_here(self, handle: Handle, observation: Observation, deadline: Deadline) -> Observation:
        ssh = self._engine.ssh
        return ssh.redirect(observation, f"{handle.data['run_dir']}/s", deadline) if ssh else observation

    def _own(self, handle: Handle, deadline: Deadline) -> Mapping[str, Any] | None:
        """Return an agent's container; None if there is none, or it is of another owner."""
        found = observe.inspect(self._engine, handle.name, deadline)
        return found if found and self._starter.is_ours(found) else None

    def _clear(self, handle: Handle, deadline: Deadline) -> None:
        """Remove the secrets and the socket of a container that does not run."""
        self._starter.secrets.remove(handle.name)
        if self._engine.ssh:
            self._engine.ssh.cancel(f"{handle.data['run_dir']}/s", deadline)
        with contextlib.suppress(OSError):
            os.unlink(f"{handle.data['run_dir']}/s")

    # -- capabilities ------------------------------------------------------------------------------------

    def suspend(self, handle: Handle, *, depth: Depth, deadline: Deadline, progress: Progress) -> None:
        if depth is Depth.DISK:
            raise self.unsupported(Capability.HIBERNATE)
        progress("pausing the container")
        self._pause(handle, deadline, pause=True)

    def resume(self, handle: Handle, *, deadline: Deadline, progress: Progress) -> None:
        progress("unpausing the container")
        self._pause(handle, deadline, pause=False)

    def _pause(self, handle: Handle, deadline: Deadline, *, pause: bool) -> None:
        try:
            with self._engine.call(f"{'pause' if pause else 'unpause'} the container", deadline) as client:
                (client.pause if pause else client.unpause)(handle.name)
        except ProviderError as error:
            found = observe.inspect(self._engine, handle.name, deadline)
            if found is None or observe.status(found) not in observe.ALIVE:
                raise NotFound(f"{handle.agent} does not run", fix="start it") from error
            if (observe.status(found) == "paused") is not pause:
                raise

    def logs(self, handle: Handle, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
        if follow:
            return logs.follow(self._engine, handle.name, tail=tail, deadline=deadline)
        return iter(logs.read(self._engine, handle.name, tail=tail, deadline=deadline))

    def usage(self, handles: Sequence[Handle], *, deadline: Deadline) -> Mapping[str, Usage]:
        wanted = {f"/{handle.name}": handle.name for handle in handles}
        if not wanted:
            return {}
        found = self._engine.containers(self.context.installation, deadline)
        ids = {one["Id"]: wanted[name] for one in found for name in one.get("Names") or () if name in wanted}
        local = ids.items() if self._engine.is_local else ()
        usages = {name: usage for one, name in local if (usage := from_cgroup(one))}
        others = {one: name for one, name in ids.items() if name not in usages}
        return usages | {others[one]: usage for one, usage in self._statistics.read(others, deadline).items()}

    def listeners(self, handle: Handle, *, deadline: Deadline) -> Sequence[str]:
        inspected = self._own(handle, deadline)
        if not inspected or not self._engine.is_local or inspected["HostConfig"].get("NetworkMode") == "host":
            return ()
        found = listening_endpoints(int(inspected["State"].get("Pid") or 0))
        return [one for one in found if not one.startswith("tcp:127.0.0.11:")]  # the engine's name server

    def watch(self, on_change: Callable[[str], None]) -> Closeable:
        watch = Watch(self._engine, self.context.installation, on_change, self.context.log)
        self._watches.append(watch)
        return watch

    def export_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        self._volumes.export(handle, directory, deadline, progress)

    def import_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        self._volumes.replace(handle, directory, deadline, progress)

    @property
    def _volumes(self) -> Volumes:
        if self._starter.volumes is None:
            raise self.unsupported(Capability.OWN_DATA)
        return self._starter.volumes

    def close(self) -> None:
        while self._watches:
            self._watches.pop().close()
        self._engine.close()
