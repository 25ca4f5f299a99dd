"""A start, from an image's id to a container that runs.  Touches the engine, and what this host keeps for it.

What a start that fails or is cancelled has made is removed.  When the engine does not answer it is left as it is:
the next start, stop or removal finds it by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dispatcher.plugin import AgentSpec, Deadline, Handle, NotFound, Progress, ProviderError, Unavailable
from dispatcher_docker import containers, observing, runs
from dispatcher_docker.endings import Endings
from dispatcher_docker.engine import Engine
from dispatcher_docker.options import DockerOptions
from dispatcher_docker.thisside import ThisSide
from dispatcher_docker.translate import NameTaken, start_failed
from dispatcher_docker.volumes import Volumes


class Starts:
    """Starts the agents of one installation.

    :param volumes: where data is in volumes, else None.
    """

    def __init__(
        self,
        engine: Engine,
        options: DockerOptions,
        installation: str,
        *,
        here: ThisSide,
        endings: Endings,
        volumes: Volumes | None,
    ) -> None:
        self._engine, self._options, self._installation = engine, options, installation
        self._here, self._endings, self._volumes = here, endings, volumes

    def find(self, handle: Handle, deadline: Deadline) -> Mapping[str, Any] | None:
        """Return an agent's container, None if there is none.

        :raises ProviderError: somebody else's is called so.
        """
        found = runs.inspect(self._engine, handle.name, deadline)
        if found is not None and not self.is_ours(found):
            raise ProviderError(
                f"A container called {handle.name} exists that is not the dispatcher's",
                why="it does not carry this installation's label",
                fix=f"look what it is, then remove it: docker rm -f {handle.name}",
            )
        return found

    def is_ours(self, found: Mapping[str, Any]) -> bool:
        """Whether a container belongs to this installation."""
        return observing.label(found["Config"].get("Labels"), "installation") == self._installation

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
        :param remapped: the engine maps user ids, and this container must have none of it.
        """
        fresh_volume = self._volumes is not None and self._volumes.ensure(handle, deadline)
        try:
            secrets = None
            if spec.secrets:
                secrets = self._here.secrets.write(handle.name, spec.secrets, containers.owner_uid(spec))
            if found and not self._fits(found, spec, image, secrets):
                progress("removing the old container")
                runs.remove(self._engine, handle.name, deadline)
                found = None
            if found is None:
                progress("creating the container")
                self._create(spec, handle, image, secrets, remapped=remapped, deadline=deadline)
            progress("starting the container")
            self._endings.forget(handle)
            self._start(spec, handle, deadline)
            progress("started")
        except Unavailable:
            raise
        except BaseException:
            runs.clean_up(self._engine, handle.name)
            self._here.secrets.remove(handle.name)
            if fresh_volume and self._volumes:
                self._volumes.remove(handle, Deadline(10))
            raise

    def _start(self, spec: AgentSpec, handle: Handle, deadline: Deadline) -> None:
        try:
            runs.start(self._engine, handle.name, spec.stdin, deadline)
        except (Unavailable, NotFound):
            raise
        except ProviderError as error:
            raise start_failed(error, self._endings.last_lines(handle, deadline)) from error

    def _create(
        self,
        spec: AgentSpec,
        handle: Handle,
        image: str,
        secrets: Path | None,
        *,
        remapped: bool,
        deadline: Deadline,
    ) -> None:
        options = containers.options_of(spec.app)
        seccomp = options.seccomp
        if seccomp not in {"default", "unconfined"}:
            seccomp = Path(seccomp).read_text(encoding="utf-8")
        body = containers.container(
            spec,
            backend=self._options,
            image_id=image,
            own_volume=self._volumes is not None,
            secrets_dir=secrets,
            seccomp="" if seccomp == "default" else seccomp,
            host_user_namespace=remapped,
        )
        try:
            runs.create(self._engine, body, handle.name, options.platform, deadline)
        except NameTaken:
            # A start that met its deadline may still have been carried out: that container is ours to remove.
            if self.find(handle, deadline) is None:
                raise
            runs.remove(self._engine, handle.name, deadline)
            runs.create(self._engine, body, handle.name, options.platform, deadline)

    @staticmethod
    def _fits(found: Mapping[str, Any], spec: AgentSpec, image: str, secrets: Path | None) -> bool:
        """Whether a container that does not run can be started for this spec."""
        config = found["Config"]
        mounts = found.get("Mounts") or ()
        shown = [one.get("Source") for one in mounts if one.get("Destination") == containers.INSIDE_SECRETS]
        return (
            runs.status(found) == "exited"
            and observing.label(config.get("Labels"), "hash") == spec.hash
            and observing.label(config.get("Labels"), "image-id") == image
            and bool(config.get("OpenStdin")) == (spec.stdin is not None)
            and shown == ([str(secrets)] if secrets else [])
        )
