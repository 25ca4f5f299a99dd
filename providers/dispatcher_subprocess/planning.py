"""From a spec to a plan: the program, what the agent sees, its variables, its place.  Reads the file system."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dispatcher.plugin import AgentSpec, App, ConfigError, Endpoint, ProviderContext, boottime, printable
from dispatcher_subprocess import network, sandbox, visible
from dispatcher_subprocess.listeners import Ports
from dispatcher_subprocess.machine import Machine
from dispatcher_subprocess.options import SEARCH_PATH, Inside, Options, endpoint_kind, environment, options_of
from dispatcher_subprocess.secretfiles import SecretFiles

_HIDDEN = Path("/etc/dispatcher")
_NEVER_SHOWN = frozenset(["/", "/proc", "/dev", "/run", "/var/run", "/sys", "/tmp"])  # noqa: S108
_FRESH = 10.0  # seconds for which a look at the disk is believed


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is decided before anything is started.

    :ivar endpoint: where the host reaches it; :ivar inside: where the agent finds its things.
    :ivar command: the app's own, placeholders filled; :ivar workdir: as seen from inside.
    :ivar view: what it sees of the host's files, None without a sandbox.
    """

    endpoint: Endpoint
    inside: Inside
    command: list[str]
    variables: Mapping[str, str]
    workdir: str
    view: sandbox.View | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What the disk says about an app; good for all its agents, for a while.

    :ivar shown: every visible path, as named and as it really is.
    """

    program: Path
    view: sandbox.View | None
    shown: frozenset[str]
    until: float


class Planner:
    """Decides what an agent needs on this host."""

    def __init__(
        self, context: ProviderContext, options: Options, machine: Machine, secret_files: SecretFiles
    ) -> None:
        self.context = context
        self.machine = machine
        self.secret_files = secret_files
        self.ports = Ports(*options.ports)
        self._looks: dict[Hashable, _Look] = {}
        self._roots: dict[Path, str] = {}

    def verify(self, app: App) -> None:
        """Check what can be checked of an app without an agent.

        :raises ConfigError: its options cannot work on this host; :raises ProviderError: its program is absent.
        """
        options = options_of(app)
        network.verify(app, endpoint_kind(app), self.machine)
        self._looks.clear()
        self._look(app)
        for path in (*options.read_only, *options.writable, *options.devices):
            if not path.exists():
                raise ConfigError(
                    f"apps.{app.name}.subprocess: there is no {path}", why="it is to be shown to the agent"
                )

    def plan(self, spec: AgentSpec, taken: Callable[[], Iterable[int]]) -> Plan:
        """Decide everything that an agent of this spec needs.

        :param taken: returns the ports that other agents were given.
        :raises ConfigError: the app's options cannot work here; :raises ProviderError: no port is free.
        """
        app, options = spec.app, options_of(spec.app)
        kind = endpoint_kind(app)
        network.verify(app, kind, self.machine)
        walled = self.machine.sandboxed
        look = self._look(app)
        if walled:
            for own in (spec.data_dir.parent, spec.run_dir.parent, spec.log_dir):
                self._refuse_exposing(app, look.shown, f"{self._root(own.parent)}/{own.name}")
        port = self.ports.choose(taken) if kind == "tcp" else 0
        inside = Inside(
            socket=f"{sandbox.RUN}/{spec.socket.name}" if walled else str(spec.socket),
            data=sandbox.DATA if walled else str(spec.data_dir),
            port=port,
        )
        return Plan(
            endpoint=Endpoint.tcp("127.0.0.1", port) if kind == "tcp" else Endpoint.unix(spec.socket),
            inside=inside,
            command=[str(look.program), *map(inside.fill, options.command[1:])],
            variables=environment(spec, inside, os.environ, self._secrets(spec)),
            workdir=inside.fill(options.workdir),
            view=look.view,
        )

    def _look(self, app: App) -> _Look:
        """Look at the disk for an app, or remember what was seen a moment ago."""
        options = options_of(app)
        search = app.environment.get("PATH", SEARCH_PATH)
        key = (
            options.command[0],
            search,
            *map(tuple, (options.read_only, options.writable, options.hide, options.devices)),
            options.tmp_size,
        )
        known = self._looks.get(key)
        if known and known.until > boottime():
            return known
        program = visible.find_program(options.command[0], search, app.name)
        view, shown = None, frozenset[str]()
        if self.machine.sandboxed:
            extra = tuple(dict.fromkeys([*visible.needed(program), *options.read_only]))
            named = [str(path) for path in (*extra, *options.writable)]
            shown = frozenset([*named, *map(os.path.realpath, named), *visible.SYSTEM])
            if shown.intersection(_NEVER_SHOWN):
                raise _exposing(app, *shown.intersection(_NEVER_SHOWN))
            for private in (self.context.state_dir, self.context.run_dir):
                self._refuse_exposing(app, shown, os.path.realpath(private))
            view = sandbox.view(options, extra, [path for path in (*options.hide, _HIDDEN) if path.exists()])
        found = _Look(program=program, view=view, shown=shown, until=boottime() + _FRESH)
        self._looks[key] = found
        return found

    def _root(self, directory: Path) -> str:
        """Return where a directory that holds agents' directories really is; there are few of them."""
        known = self._roots.get(directory)
        if known is None:
            known = self._roots[directory] = os.path.realpath(directory)
        return known

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

    @staticmethod
    def _refuse_exposing(app: App, shown: Iterable[str], private: str) -> None:
        for path in shown:
            if private == path or private.startswith(f"{path}/"):
                raise _exposing(app, path)


def _exposing(app: App, path: str, *_: str) -> ConfigError:
    return ConfigError(
        f"apps.{app.name}.subprocess: {path} cannot be shown to an agent",
        why="the dispatcher's own files, or other agents', lie below it",
        fix="name just the directories that the app needs",
    )
