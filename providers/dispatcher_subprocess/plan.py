"""From an agent's spec to a plan: its program, the files that it sees, its environment, its endpoint.

Every sandbox shows `/usr` and its like and `/etc`.  The command adds what it needs: a Python virtual environment
with the installation that it was made from, or a single program elsewhere.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import dispatcher
from dispatcher.plugin import (
    SYSTEM_PATH,
    AgentSpec,
    App,
    ConfigError,
    Endpoint,
    Inside,
    Network,
    ProviderContext,
    ProviderError,
    SecretFiles,
    Unsupported,
    boottime,
)
from dispatcher_subprocess import network, sandbox
from dispatcher_subprocess.explain import capabilities
from dispatcher_subprocess.host import Host
from dispatcher_subprocess.options import (
    SHELL,
    AppOptions,
    Options,
    endpoint_kind,
    options_of,
)
from dispatcher_subprocess.sandbox import SYSTEM, below

_HIDDEN = Path("/etc/dispatcher")
_NEVER_SHOWN = frozenset(["/", "/proc", "/dev", "/run", "/var/run", "/sys", "/tmp"])  # noqa: S108
_CACHED = 10.0  # seconds for which what was found on the disk is reused
_OWN = ("/proc", "/dev", sandbox.DATA, sandbox.RUN, sandbox.SECRETS)
_FILE_NAME = re.compile(r"(?<![^\s='\":,])/[^\s'\":,;]+")  # an absolute path in an argument
_SHEBANG = 256  # bytes, as much as the kernel reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is decided before anything is started.

    :ivar endpoint: where the host reaches it; :ivar command: the app's, placeholders filled.
    :ivar workdir: as seen from inside; :ivar view: the host's files that it sees, None without a sandbox.
    :ivar unseen: a file of the host that the command names and the agent does not see, or "".
    """

    endpoint: Endpoint
    command: list[str]
    variables: Mapping[str, str]
    workdir: str
    view: sandbox.Tree | None
    unseen: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """The files of an app, the same for all its agents.

    :ivar shown: every visible path, as named and with links resolved; :ivar unseen: as in Plan.
    """

    program: Path
    view: sandbox.Tree | None
    shown: frozenset[str]
    unseen: str
    until: float


class Planner:
    """Makes the plans for agents on this host."""

    def __init__(self, context: ProviderContext, options: Options, host: Host, secret_files: SecretFiles) -> None:
        self.context = context
        self.host = host
        self.secret_files = secret_files
        self.ports = Ports(*options.ports)
        self._capabilities = capabilities(host)
        self._cache: dict[Hashable, _Files] = {}

    def verify(self, app: App) -> None:
        """Check an app, as far as that is possible without an agent.

        :raises ConfigError: its options cannot work on this host; :raises ProviderError: its program is absent.
        """
        self._cache.clear()
        for error in self.faults(app):
            raise error

    def faults(self, app: App, *, likely: bool = False) -> Iterator[ConfigError | ProviderError | Unsupported]:
        """Yield why no agent of an app could start, each with its key.

        :param likely: also that its command names a file which its sandbox hides; not that this user finds no
            program where it may not look.
        """
        options, key = options_of(app), f"apps.{app.name}.subprocess"
        try:
            network.verify(app, endpoint_kind(app), self.host)
        except (ConfigError, Unsupported) as error:
            yield error
        for name in ("read_only", "writable", "devices"):
            for path in getattr(options, name):
                if _exists(path) is False:
                    yield ConfigError(f"{key}.{name}: there is no {path}", fix="create it, or correct the path")
        try:
            program = find_program(options.command[0], app.environment.get("PATH", SYSTEM_PATH), app.name)
        except ProviderError as error:
            if not likely or _exists(Path(options.command[0])) is not None:
                yield error
            shown = visible(options, ())
        else:
            shown = visible(options, needed(program))
        workdir, hidden = Path(options.workdir), False
        if self.host.sandboxed:
            yield from _forbidden(app, shown, (self.context.state_dir, self.context.run_dir))
            hidden = not any(below(workdir, [one]) or below(one, [workdir]) for one in shown)
            if likely and (unseen := unseen_file(app, shown)):
                yield ConfigError(
                    f"{key}.command: {unseen} exists on this host, but is not visible in the sandbox",
                    fix=f'add "{unseen}", or its directory, to {key}.read_only',
                )

        if workdir.is_absolute() and not below(workdir, (*_OWN, "/tmp")):  # noqa: S108
            if _exists(workdir) is False:
                yield ConfigError(f"{key}.workdir: there is no {workdir}", fix="create it, or correct the path")
            elif hidden:
                yield ConfigError(
                    f"{key}.workdir: {workdir} is not visible in the sandbox", fix=f"add it to {key}.read_only"
                )

    def plan(self, spec: AgentSpec, taken: Callable[[], Iterable[int]]) -> Plan:
        """Return the plan for an agent.

        :param taken: returns the ports of other agents.
        :raises ConfigError: the app's options cannot work here; :raises ProviderError: no port is free.
        :raises Unavailable: this host has no network now.
        """
        app, options = spec.app, options_of(spec.app)
        kind = endpoint_kind(app)
        network.verify(app, kind, self.host)
        network.require_route(app, self.host)
        files = self._files(app)
        for error in _forbidden(app, files.shown, (spec.data_dir.parent, spec.run_dir.parent, spec.log_dir)):
            raise error
        port = self.ports.choose(taken) if kind == "tcp" else 0
        if self.host.sandboxed:
            inside = Inside(
                socket=f"{sandbox.RUN}/{spec.socket.name}",
                data=sandbox.DATA,
                port=port,
                tmp=sandbox.TMP,
                secrets=sandbox.SECRETS,
            )
        else:
            secrets = str(self.secret_files.path(spec.backend_name)) if spec.secrets else ""
            inside = Inside(socket=str(spec.socket), data=str(spec.data_dir), port=port, secrets=secrets)
        return Plan(
            endpoint=Endpoint.tcp("127.0.0.1", port) if kind == "tcp" else Endpoint.unix(spec.socket),
            command=[str(files.program), *map(inside.fill, options.command[1:])],
            variables=inside.environment(
                spec,
                limits=app.limits.enforced(self._capabilities),
                shell=SHELL,
                others={name: os.environ[name] for name in options.pass_environment if name in os.environ},
            ),
            workdir=inside.fill(options.workdir),
            view=files.view,
            unseen=files.unseen,
        )

    def _files(self, app: App) -> _Files:
        """Find the files of an app, or return those found a moment ago."""
        options = options_of(app)
        search = app.environment.get("PATH", SYSTEM_PATH)
        key = (options.model_dump_json(), tuple(app.environment.items()), app.network)
        known = self._cache.get(key)
        if known and known.until > boottime():
            return known
        program = find_program(options.command[0], search, app.name)
        view, shown = None, frozenset[str]()
        if self.host.sandboxed:
            extra = tuple(dict.fromkeys([*needed(program), *options.read_only]))
            shown = visible(options, extra)
            for error in _forbidden(app, shown, (self.context.state_dir, self.context.run_dir)):
                raise error
            view = sandbox.view(
                options,
                extra,
                [path for path in (*options.hide, _HIDDEN) if path.exists()],
                own_uid=self.host.own_uid,
                own_resolver=app.network is Network.PRIVATE,
                sizes=self.host.sizes,
            )
        unseen = unseen_file(app, shown) if self.host.sandboxed else ""
        found = _Files(program=program, view=view, shown=shown, unseen=unseen, until=boottime() + _CACHED)
        self._cache[key] = found
        return found


def visible(options: AppOptions, extra: Iterable[Path]) -> frozenset[str]:
    """Return every path of the host that an agent sees, as named and with links resolved.

    :param extra: those that its program needs.
    """
    named = [str(path) for path in (*extra, *options.read_only, *options.writable)]
    return frozenset([*named, *map(os.path.realpath, named), *SYSTEM])


def _forbidden(app: App, shown: Iterable[str], private: Iterable[Path]) -> Iterator[ConfigError]:
    """Yield an error for each path that an agent sees, and that contains one of the dispatcher's own."""
    hidden = [*map(os.path.realpath, private)]
    options = options_of(app)
    for path in sorted(shown):
        if path in _NEVER_SHOWN or any(one == path or one.startswith(f"{path}/") for one in hidden):
            lists = {"read_only": options.read_only, "writable": options.writable}
            key = next((key for key, paths in lists.items() if _among(path, paths)), "command")
            yield ConfigError(
                f"apps.{app.name}.subprocess.{key}: {path} cannot be shown to an agent",
                why="the dispatcher's own files, or other agents', lie below it",
                fix="name just the directories that the app needs",
            )


def _among(path: str, paths: Iterable[Path]) -> bool:
    return any(path in {str(one), os.path.realpath(one)} for one in paths)


def unseen_file(app: App, shown: Iterable[str]) -> str:
    """Return a file of this host that the app's arguments or variables name and its agents do not see, or ""."""
    text: str
    for text in (*options_of(app).command[1:], *app.environment.values()):
        for name in _FILE_NAME.findall(text):
            for path in map(Path, (os.path.normpath(name), os.path.realpath(name))):
                if os.path.isfile(path) and not below(path, (*shown, *_OWN)):
                    return str(path)
    return ""


def _exists(path: Path) -> bool | None:
    """Whether there is something at a path; None where this user may not look."""
    try:
        path.stat()
    except PermissionError:
        return None
    except OSError:
        return False
    return True


def find_program(name: str, search: str, app: str) -> Path:
    """Return the absolute path of an app's program, symbolic links kept.

    :raises ProviderError: there is no such program.
    """
    found = shutil.which(name, path=search)
    if not found or not os.path.isabs(found):
        raise ProviderError(
            f"apps.{app}.subprocess.command: there is no program {name!r}",
            why=f"no program at that path or in {search}"
            if os.path.isabs(name) or "/" not in name
            else "the path is relative",
            fix="install it, or give its absolute path",
        )
    return Path(os.path.normpath(found))


def needed(program: Path) -> tuple[Path, ...]:
    """Return the paths beyond SYSTEM that a program needs, none of them below another."""
    found: list[Path] = []
    for path in dict.fromkeys(_closure(program)):
        inside = below(path, SYSTEM) or below(os.path.realpath(path), SYSTEM) or path == Path("/")
        if not inside and path.exists():  # a missing interpreter is reported by the app's start
            found.append(path)
    return tuple(path for path in found if not below(path, [other for other in found if other != path]))


def _closure(program: Path, depth: int = 0) -> Iterator[Path]:
    if depth > 8:  # deeper than that is a loop
        return
    prefix = program.parent.parent
    configuration = prefix / "pyvenv.cfg"
    if configuration.is_file():
        yield prefix
        if prefix == Path(sys.prefix):
            yield Path(dispatcher.__file__).parent  # elsewhere in a development installation
        home = _home(configuration)
        if home:
            yield from _installation(home)
    elif program == Path(sys.executable):
        yield from _installation(program.parent)
        yield Path(dispatcher.__file__).parent
    elif program.name.startswith("python") and program.parent.name == "bin":
        yield from _installation(program.parent)
    else:
        yield program
    if program.is_symlink():
        target = Path(os.path.normpath(program.parent / os.readlink(program)))
        yield from _closure(target, depth + 1)
    interpreter = _interpreter(program)
    if interpreter:
        yield from _closure(interpreter, depth + 1)


def _installation(directory: Path) -> Iterator[Path]:
    """Yield the prefix of a Python whose programs are in `directory`, as named and with links resolved."""
    yield directory.parent
    yield Path(os.path.realpath(directory)).parent


def _home(configuration: Path) -> Path | None:
    for line in configuration.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition("=")
        if key.strip().lower() == "home" and os.path.isabs(value.strip()):
            return Path(value.strip())
    return None


def _interpreter(program: Path) -> Path | None:
    try:
        with program.open("rb") as file:
            first = file.read(_SHEBANG).split(b"\n", 1)[0]
    except OSError:
        return None
    words = first[2:].split() if first.startswith(b"#!") else []
    if not words or not words[0].startswith(b"/"):
        return None
    return Path(os.path.normpath(os.fsdecode(words[0])))


class Ports:
    """Chooses TCP ports in turn, so that a new agent's port is not chosen again while it starts."""

    def __init__(self, first: int, last: int) -> None:
        self._range = range(first, last + 1)
        self._turns = itertools.cycle(self._range)

    def choose(self, taken: Callable[[], Iterable[int]]) -> int:
        """Return a port that is free now and belongs to no known agent.

        :raises ProviderError: none is free.
        """
        avoid = frozenset(taken())
        for port in itertools.islice(self._turns, len(self._range)):
            if port not in avoid and _free(port):
                return port
        raise ProviderError(
            "No TCP port is free",
            why=f"all of {self._range[0]} to {self._range[-1]} are taken",
            fix="widen providers.subprocess.ports, or use {socket}",
        )


def _free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
