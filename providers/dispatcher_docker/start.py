"""Starting an agent: from an image's id to a container that runs.

A start that fails or is cancelled removes what it created.  If the engine does not answer, that stays: the next
start, stop or removal finds it by its name.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dispatcher.plugin import (
    AgentSpec,
    Deadline,
    DispatcherError,
    Handle,
    Network,
    NotFound,
    Progress,
    ProviderContext,
    ProviderError,
    SecretFiles,
    Unavailable,
    make_temporary,
    remove_tree,
)
from dispatcher_docker import container_config, observe, seccomp
from dispatcher_docker.container_config import ContainerSettings
from dispatcher_docker.data import Users, Volumes, groups_of
from dispatcher_docker.engine import Client, Engine
from dispatcher_docker.errors import NameTaken, NoSuchObject, start_failed
from dispatcher_docker.observe import ExitReasons
from dispatcher_docker.options import DockerOptions
from dispatcher_docker.stop import remove
from dispatcher_docker.usage import counts_socket_buffers_apart, limit_socket_buffers


class Starter:
    """Starts the agents of one installation, and has what belongs to them outside of their containers.

    :ivar volumes: None where data is in the core's own directories.
    """

    def __init__(self, engine: Engine, options: DockerOptions, context: ProviderContext) -> None:
        self._engine, self._options, self._installation = engine, options, context.installation
        self.secrets = SecretFiles(
            f"dispatcher-{context.installation}-secrets-docker",
            [context.run_dir, Path(f"/run/user/{os.geteuid()}"), Path("/dev/shm")],  # noqa: S108
        )
        self.users = Users(engine, context.installation, context.run_dir / "users")
        self.exit_reasons = ExitReasons(engine, context.state_dir)
        self._profiles = context.state_dir / "seccomp"
        self.volumes: Volumes | None = None
        if options.data == "volume" or (options.data == "auto" and not engine.is_local):
            self.volumes = Volumes(engine, context.installation, privileged=context.privileged)

    def _seccomp(self, spec: AgentSpec) -> str:
        """Return the option `seccomp` as this engine takes it."""
        options = container_config.options_of(spec.app)
        multicast = spec.app.network is Network.HOST
        profile = seccomp.chosen(options.seccomp, options.cap_add, spec.app.name, multicast=multicast)
        return seccomp.as_file(profile, self._profiles) if self._engine.is_podman else profile

    def find(self, handle: Handle, deadline: Deadline) -> Mapping[str, Any] | None:
        """Return an agent's container, None if there is none.

        :raises ProviderError: the name belongs to another's container.
        """
        found = observe.inspect(self._engine, handle.name, deadline)
        if found is not None and not self.is_ours(found):
            raise ProviderError(
                f"The name {handle.name} belongs to a container of another owner",
                why="it does not carry this installation's label",
                fix=f"inspect that container, then remove it: docker rm -f {handle.name}",
            )
        return found

    def is_ours(self, found: Mapping[str, Any]) -> bool:
        """Whether a container belongs to this installation."""
        return observe.label(found["Config"].get("Labels"), "installation") == self._installation

    def run(
        self,
        spec: AgentSpec,
        handle: Handle,
        found: Mapping[str, Any] | None,
        *,
        image: str,
        remapped: bool,
        deadline: Deadline,
        progress: Progress,
    ) -> None:
        """Make the agent's container run.

        :param found: the one that exists and does not run; :param image: id of the image;
        :param remapped: the engine maps user ids.
        """
        options = container_config.options_of(spec.app)
        new_volume = self.volumes is not None and self.volumes.ensure(handle, deadline)
        try:
            if self.volumes is None:
                make_temporary(spec.data_dir / container_config.TEMPORARY, spec.uid, spec.gid, deadline)
            owner = container_config.owner_uid(spec)
            settings = ContainerSettings(
                image_id=image,
                own_volume=self.volumes is not None,
                secrets_dir=self.secrets.write(handle.name, spec.secrets, owner, -1) if spec.secrets else None,
                user=self.users.prepare(spec, image, deadline),
                groups=groups_of(options) if self._engine.is_local else (),
                seccomp=self._seccomp(spec),
                log_driver="json-file" if self._engine.is_podman and self._options.log_driver == "local" else "",
                host_user_namespace=remapped,
            )
            if found and not _fits(found, spec, settings):
                progress("removing the old container")
                remove(self._engine, handle.name, deadline)
                found = None
            if self._engine.is_local:
                remove_tree(spec.socket, deadline=deadline)  # an agent that ended by itself can leave a link
            self.exit_reasons.forget(handle)
            if found is None:
                self._create(spec, handle, settings, deadline, progress)
            progress("starting the container")
            try:
                self._start(spec, handle, deadline)
            except NoSuchObject:
                if found is None:
                    raise
                # It refers to a network by its id, and that was removed, or made again, while nothing used it.
                remove(self._engine, handle.name, deadline)
                self._create(spec, handle, settings, deadline, progress)
                self._start(spec, handle, deadline)
            self._limit_socket_buffers(spec, handle, deadline)
            progress("started")
        except Unavailable:
            raise
        except BaseException:
            with contextlib.suppress(DispatcherError):  # if the engine does not answer, the next start does it
                remove(self._engine, handle.name, Deadline(10))
            self.secrets.remove(handle.name)
            if new_volume and self.volumes:
                self.volumes.remove(handle, Deadline(10))
            raise

    def _create(
        self, spec: AgentSpec, handle: Handle, settings: ContainerSettings, deadline: Deadline, progress: Progress
    ) -> None:
        progress("creating the container")
        body = container_config.container(spec, self._options, settings)
        platform = container_config.options_of(spec.app).platform
        try:
            self._engine.make(body, handle.name, deadline, platform)
        except NameTaken:
            # An earlier start may have been carried out after its deadline: its container goes.  A Podman that was
            # killed can have kept the container's storage alone, which no list has.
            if self.find(handle, deadline) is None and not self._engine.is_podman:
                raise
            remove(self._engine, handle.name, deadline)
            self._engine.make(body, handle.name, deadline, platform)

    def _limit_socket_buffers(self, spec: AgentSpec, handle: Handle, deadline: Deadline) -> None:
        limit = spec.app.limits.memory
        if limit and self._engine.is_local and counts_socket_buffers_apart():
            found = self.find(handle, deadline)
            if found is not None:
                limit_socket_buffers(found["Id"], limit)

    def _start(self, spec: AgentSpec, handle: Handle, deadline: Deadline) -> None:
        """Start the container; write its standard input, then close that."""
        try:
            with self._engine.call("start the container", deadline) as client:
                if spec.stdin is None:
                    client.start(handle.name)
                else:
                    with _attached(client, handle.name) as sock:
                        client.start(handle.name)
                        _send_all(sock, spec.stdin, deadline)
        except (Unavailable, NotFound):
            raise
        except ProviderError as error:
            raise start_failed(error, self.exit_reasons.last_lines(handle, deadline)) from error


def _fits(found: Mapping[str, Any], spec: AgentSpec, settings: ContainerSettings) -> bool:
    """Whether a container that does not run can be started for this spec."""
    config = found["Config"]
    mounts = found.get("Mounts") or ()
    shown = [one.get("Source") for one in mounts if one.get("Destination") == container_config.INSIDE_SECRETS]
    return (
        observe.status(found) == "exited"
        and observe.label(config.get("Labels"), "hash") == spec.hash
        and observe.label(config.get("Labels"), "image-id") == settings.image_id
        and bool(config.get("OpenStdin")) == (spec.stdin is not None)
        and (found.get("HostConfig") or {}).get("NetworkMode") == container_config.network_mode(spec)
        and shown == ([str(settings.secrets_dir)] if settings.secrets_dir else [])
    )


@contextlib.contextmanager
def _attached(client: Client, container: str) -> Iterator[socket.socket]:
    stream = client.attach_socket(container, params={"stdin": 1, "stream": 1})
    try:
        yield getattr(stream, "_sock", stream)
    finally:
        response = getattr(stream, "_response", None)
        with contextlib.suppress(ValueError, OSError):  # the engine has closed the connection already
            if response is not None:
                response.close()
            stream.close()


def _send_all(sock: socket.socket, content: bytes, deadline: Deadline) -> None:
    sock.settimeout(max(0.1, deadline.remaining()))
    sock.sendall(content)
    sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(OSError):
        sock.settimeout(min(2.0, max(0.1, deadline.remaining())))
        while sock.recv(4096):
            pass  # the engine closes the connection once it has forwarded everything
