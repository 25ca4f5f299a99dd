"""From a spec to a plan: the program, what the agent sees, its variables, its place.  Reads the file system."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dispatcher.errors import ConfigError
from dispatcher.model import AgentSpec, App, Endpoint
from dispatcher.names import printable
from dispatcher.provider import ProviderContext
from dispatcher_subprocess import network, sandbox, visible
from dispatcher_subprocess.listeners import Ports
from dispatcher_subprocess.machine import Machine
from dispatcher_subprocess.options import SEARCH_PATH, Inside, Options, endpoint_kind, environment, options_of
from dispatcher_subprocess.secretfiles import SecretFiles

_HIDDEN = Path("/etc/dispatcher")
_NEVER_SHOWN = tuple(Path(name) for name in ("/", "/proc", "/dev", "/run", "/var/run", "/sys", "/tmp"))  # noqa: S108


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is decided before anything is started.

    :ivar endpoint: where the host reaches it; :ivar inside: where the agent finds its things.
    :ivar command: the app's own, placeholders filled; :ivar workdir: as seen from inside.
    :ivar shown: paths beyond the system's, read-only; :ivar hidden: paths below shown ones to cover up.
    """

    endpoint: Endpoint
    inside: Inside
    command: list[str]
    variables: Mapping[str, str]
    workdir: str
    shown: tuple[Path, ...]
    hidden: tuple[Path, ...]


class Planner:
    """Decides what an agent needs on this host."""

    def __init__(
        self, context: ProviderContext, options: Options, machine: Machine, secret_files: SecretFiles
    ) -> None:
        self.context = context
        self.machine = machine
        self.secret_files = secret_files
        self.ports = Ports(*options.ports)

    def verify(self, app: App) -> None:
        """Check what can be checked of an app without an agent.

        :raises ConfigError: its options cannot work on this host.
        """
        options = options_of(app)
        network.verify(app, endpoint_kind(app), self.machine)
        self._program(app)
        for path in (*options.read_only, *options.writable):
            if not path.exists():
                raise ConfigError(
                    f"apps.{app.name}.subprocess: there is no {path}", why="it is to be shown to the agent"
                )
            self._refuse_exposing(app, path, ())

    def plan(self, spec: AgentSpec, taken: Callable[[], Iterable[int]]) -> Plan:
        """Decide everything that an agent of this spec needs.

        :param taken: returns the ports that other agents were given.
        :raises ConfigError: the app's options cannot work here; :raises ProviderError: no port is free.
        """
        app, options = spec.app, options_of(spec.app)
        kind = endpoint_kind(app)
        network.verify(app, kind, self.machine)
        walled = self.machine.sandboxed
        port = self.ports.choose(taken) if kind == "tcp" else 0
        inside = Inside(
            socket=f"{sandbox.RUN}/{spec.socket.name}" if walled else str(spec.socket),
            data=sandbox.DATA if walled else str(spec.data_dir),
            port=port,
        )
        program = self._program(app)
        shown = tuple(dict.fromkeys([*visible.needed(program), *options.read_only]))
        for path in (*shown, *options.writable, *map(Path, visible.SYSTEM)):
            self._refuse_exposing(app, path, (spec.data_dir.parent, spec.run_dir.parent, spec.log_dir))
        hidden = [path for path in (*options.hide, _HIDDEN) if path.exists()]
        return Plan(
            endpoint=Endpoint.tcp("127.0.0.1", port) if kind == "tcp" else Endpoint.unix(spec.socket),
            inside=inside,
            command=[str(program), *map(inside.fill, options.command[1:])],
            variables=environment(spec, inside, os.environ, self._secrets(spec)),
            workdir=inside.fill(options.workdir),
            shown=shown,
            hidden=tuple(hidden),
        )

    def _program(self, app: App) -> Path:
        return visible.find_program(options_of(app).command[0], app.environment.get("PATH", SEARCH_PATH), app.name)

    def _secrets(self, spec: AgentSpec) -> str:
        """Return the directory of the secrets as seen from inside, "" without any."""
        for name in spec.secrets:
            if "/" in name or "\0" in name or name in {"", ".", ".."} or len(os.fsencode(name)) > 255:
                raise ConfigError(
                    f"The secret {printable(name)} has no name for a file", fix="use letters, digits, - and _"
                )
        if not spec.secrets:
            return ""
        return sandbox.SECRETS if self.machine.sandboxed else str(self.secret_files.path(spec.backend_name))

    def _refuse_exposing(self, app: App, path: Path, own: Iterable[Path]) -> None:
        if not self.machine.sandboxed:
            return
        real = Path(os.path.realpath(path))
        private = [Path(os.path.realpath(p)) for p in (self.context.state_dir, self.context.run_dir, *own)]
        if {path, real}.intersection(_NEVER_SHOWN) or any(real in (p, *p.parents) for p in private):
            raise ConfigError(
                f"apps.{app.name}.subprocess: {path} cannot be shown to an agent",
                why="the dispatcher's own files, or other agents', lie below it",
                fix="name just the directories that the app needs",
            )
