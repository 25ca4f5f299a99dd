"""Values that the core and the providers exchange: frozen dataclasses.

A spec describes an agent as it must be, a handle identifies it on its backend, an observation reports its state.
Stored values have a JSON form with a version.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest

HANDLE_VERSION = 1


class Isolation(enum.IntEnum):
    """Strength of the isolation of agents; ordered."""

    PROCESS = 1
    CONTAINER = 2
    VM = 3


class Capability(str, enum.Enum):
    """Optional features of a provider.  A method of an undeclared one raises `Unsupported`.

    :ivar SUSPEND: keeps a frozen agent's memory in RAM; :ivar HIBERNATE: keeps it on disk.
    :ivar DISK_LIMIT: limits data itself; without it, the core limits data in the canonical directory.
    :ivar EVENTS: `watch` reports changes.
    :ivar OWN_DATA: data is not the canonical directory: `export_data` and `import_data` work.
    :ivar CREDENTIALS: passes the credentials of the sign-in to the app on its standard input.
    """

    SUSPEND = "suspend"
    HIBERNATE = "hibernate"
    LOGS = "logs"
    USAGE = "usage"
    MEMORY_LIMIT = "memory-limit"
    CPU_LIMIT = "cpu-limit"
    PIDS_LIMIT = "pids-limit"
    DISK_LIMIT = "disk-limit"
    EVENTS = "events"
    OWN_DATA = "own-data"
    CREDENTIALS = "credentials"
    NETWORK_NONE = "network-none"
    NETWORK_PRIVATE = "network-private"
    NETWORK_HOST = "network-host"


class Depth(str, enum.Enum):
    """Where a suspended agent's memory is kept."""

    RAM = "ram"
    DISK = "disk"


class Network(str, enum.Enum):
    """Network access of an agent: none, other hosts only, or everything that this host reaches."""

    NONE = "none"
    PRIVATE = "private"
    HOST = "host"


class BackendState(str, enum.Enum):
    """State of an agent on its backend."""

    ABSENT = "absent"  # does not exist
    STARTING = "starting"  # exists, not yet able to listen
    RUNNING = "running"  # executes; the core's health check decides whether it is ready
    SUSPENDED = "suspended"
    HIBERNATED = "hibernated"
    STOPPED = "stopped"  # exists, does not execute; `exit_reason` is set when it ended by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where an agent listens: ``unix:PATH``, ``tcp:HOST:PORT`` (IPv6 in brackets) or ``vsock:CID:PORT``."""

    kind: str
    path: str = ""
    host: str = ""
    port: int = 0
    cid: int = 0

    @classmethod
    def unix(cls, path: Path | str) -> Endpoint:
        """Return the endpoint of a Unix socket."""
        return cls(kind="unix", path=str(path))

    @classmethod
    def tcp(cls, host: str, port: int) -> Endpoint:
        """Return the endpoint of a TCP port."""
        return cls(kind="tcp", host=host, port=port)

    @classmethod
    def vsock(cls, cid: int, port: int) -> Endpoint:
        """Return the endpoint of a vsock port."""
        return cls(kind="vsock", cid=cid, port=port)

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Return the endpoint that `text` names.

        :raises BadRequest: it is not one of the three forms.
        """
        kind, _, rest = text.partition(":")
        try:
            if kind == "unix" and rest.startswith("/"):
                return cls.unix(rest)
            if kind == "tcp":
                host, _, port = rest.rpartition(":")
                if host and 0 < int(port) < 65536:
                    return cls.tcp(host.strip("[]"), int(port))
            if kind == "vsock":
                cid, _, port = rest.partition(":")
                return cls.vsock(int(cid), int(port))
        except ValueError:
            pass
        raise BadRequest(
            f"Bad endpoint {names.printable(text)}", fix="use unix:/PATH, tcp:HOST:PORT or vsock:CID:PORT"
        )

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        if self.kind == "vsock":
            return f"vsock:{self.cid}:{self.port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds of one agent; None is unlimited.

    :ivar memory: bytes; :ivar swap: bytes beyond memory; :ivar cpus: cores.
    :ivar pids: processes and threads; :ivar disk: bytes of data.
    :ivar defaults: names of the bounds that are the core's own: the configuration does not set them.  A provider
        that cannot enforce one of these starts the agent all the same; a virtual machine has a size of its own.
    """

    memory: int | None = None
    swap: int | None = None
    cpus: float | None = None
    pids: int | None = None
    disk: int | None = None
    defaults: frozenset[str] = frozenset()

    def demanded(self, name: str) -> float | None:
        """Return a bound that the configuration sets; None for none, or for one of `defaults`."""
        value: float | None = None if name in self.defaults else getattr(self, name)
        return value

    def enforced(self, capabilities: Container[Capability]) -> Limits:
        """Return the bounds that a provider with these capabilities enforces, or the core for data on the host."""
        kinds = {"memory": "memory", "swap": "memory", "cpus": "cpu", "pids": "pids", "disk": "disk"}
        off: dict[str, Any] = {
            name: None for name, kind in kinds.items() if Capability(f"{kind}-limit") not in capabilities
        }
        if Capability.OWN_DATA not in capabilities:
            off.pop("disk", None)
        return replace(self, **off)


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """A template for agents: validated, with the provider's own options.

    `options` is an instance of the provider's `AppOptions`.
    """

    name: str
    provider: str
    options: BaseModel
    limits: Limits = field(default_factory=Limits)
    network: Network = Network.NONE
    environment: Mapping[str, str] = field(default_factory=dict)
    credentials: str = "none"  # "none" or "stdin"
    _known: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def fingerprint(self) -> dict[str, Any]:
        """Return the values whose change makes a running agent *outdated*; JSON-serialisable, without secrets."""
        return {
            "app": self.name,
            "provider": self.provider,
            "options": self.options.model_dump(mode="json"),
            "limits": [
                "default" if name in self.limits.defaults else getattr(self.limits, name)
                for name in ("memory", "swap", "cpus", "pids", "disk")
            ],
            "network": self.network.value,
            "environment": dict(sorted(self.environment.items())),
            "credentials": self.credentials,
        }

    @property
    def fingerprint_text(self) -> str:
        """The fingerprint as JSON, cached: many agents of an app can start at the same time."""
        if not self._known:
            self._known.append(json.dumps(self.fingerprint(), sort_keys=True, default=str))
        return self._known[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpec:
    """Specification of an agent.  Its directories exist before a provider gets it.

    :ivar installation: 8 hexadecimal digits; two installations never share one.
    :ivar agent: canonical agent name; :ivar user: canonical name of its user.
    :ivar uid: host user id of the agent alone; :ivar gid: its group; :ivar proxy_gid: the proxy's group.
    :ivar data_dir: canonical data, owned by `uid`; :ivar run_dir: ``2710 uid:proxy_gid``, short path, for
        sockets (use `socket`); :ivar log_dir: owned by the manager, for the provider's log files.
    :ivar secrets: values that the app gets as files in memory, never in arguments, labels or environment
        of the backend; not part of the hash.
    :ivar stdin: credentials of the sign-in for apps with ``credentials = "stdin"``; not part of the hash.
    """

    installation: str
    agent: str
    user: str
    app: App
    uid: int
    gid: int
    proxy_gid: int
    data_dir: Path
    run_dir: Path
    log_dir: Path
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    stdin: bytes | None = field(default=None, repr=False)

    @property
    def backend_name(self) -> str:
        """``dispatcher-INSTALLATION-SLUG-HASH``."""
        return names.backend_name(self.installation, self.agent)

    @property
    def socket(self) -> Path:
        """Path for a Unix endpoint, under 108 bytes."""
        return self.run_dir / "s"

    def variables(self, data: str, secrets: str = "", *, limits: Limits | None = None) -> dict[str, str]:
        """Return the variables that every app finds in its environment, besides HOME and its own.

        ``DISPATCHER_AGENT``, ``_USER`` and ``_DATA``, ``_SECRETS`` where there are secrets, and the limits that
        are set: ``_MEMORY_LIMIT`` and ``_DISK_LIMIT`` in bytes, ``_CPU_LIMIT`` in cores, ``_PIDS_LIMIT``.

        :param data: the data directory as seen from inside; :param secrets: the directory of the secrets.
        :param limits: those that are enforced; by default the app's.
        """
        limits = limits or self.app.limits
        found = {"AGENT": self.agent, "USER": self.user, "DATA": data}
        if self.secrets:
            found["SECRETS"] = secrets
        cpus = f"{limits.cpus:g}" if limits.cpus else None
        bounds = {"MEMORY": limits.memory, "CPU": cpus, "PIDS": limits.pids, "DISK": limits.disk}
        found |= {f"{name}_LIMIT": str(value) for name, value in bounds.items() if value}
        return {f"DISPATCHER_{name}": value for name, value in found.items()}

    @property
    def hash(self) -> str:
        """SHA-256 over everything that defines the agent, without secrets."""
        body = [
            self.installation,
            self.agent,
            self.user,
            self.uid,
            self.gid,
            str(self.data_dir),
            str(self.run_dir),
        ]
        text = f"{json.dumps(body)[:-1]}, {self.app.fingerprint_text}]"
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """Identifies an agent on its backend.  JSON with a version: enough to adopt it after a restart.

    :ivar name: the agent's backend name, unique on the backend; :ivar data: the provider's own, JSON.
    """

    provider: str
    agent: str
    name: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the stored form."""
        return json.dumps({"version": HANDLE_VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Handle:
        """Return the handle that `to_json` wrote.

        :raises BadRequest: damaged, or of a newer version.
        """
        try:
            body = json.loads(text)
            version = body["version"]
            if version == HANDLE_VERSION:
                return cls(provider=body["provider"], agent=body["agent"], name=body["name"], data=body["data"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadRequest("Damaged handle", why=str(error)) from error
        raise BadRequest(f"Handle of version {version}", why=f"this program supports version {HANDLE_VERSION}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """State of an agent at the time of a call.

    :ivar endpoint: where it listens or will listen, when known; :ivar owner_uid: host user id that must own
        a Unix endpoint's socket, None where the provider guarantees it otherwise.
    :ivar started_at: Unix time in seconds of the last start, None where `list` does not know it.
    :ivar spec_hash: hash of the spec it was made from.
    :ivar exit_reason: why it ended by itself ("exit code 1", "killed by signal 9", "out of memory"), or "".
    :ivar detail: one more sentence for an operator.
    :ivar oom_kills: how many of its processes the kernel has killed for memory since its start; 0 where the
        provider does not know.
    """

    state: BackendState
    endpoint: Endpoint | None = None
    owner_uid: int | None = None
    started_at: float | None = None
    spec_hash: str = ""
    exit_reason: str = ""
    detail: str = ""
    oom_kills: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Resources that an agent uses now.

    :ivar memory: bytes; :ivar cpu_seconds: since its start.
    :ivar disk: bytes of data; the core adds them for data in the canonical directory.
    :ivar disk_limit: bytes that the data can take.
    """

    memory: int | None = None
    cpu_seconds: float | None = None
    disk: int | None = None
    disk_limit: int | None = None


class Level(str, enum.Enum):
    """Severity of a finding."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One result of `providers check` or `doctor`: a fact, and what to do about it."""

    level: Level
    what: str
    fix: str = ""

    @classmethod
    def ok(cls, what: str) -> Finding:
        """Return a finding that something is in order."""
        return cls(level=Level.OK, what=what)

    @classmethod
    def info(cls, what: str, fix: str = "") -> Finding:
        """Return a finding that states a fact."""
        return cls(level=Level.INFO, what=what, fix=fix)

    @classmethod
    def warning(cls, what: str, fix: str = "") -> Finding:
        """Return a finding about a weakness."""
        return cls(level=Level.WARNING, what=what, fix=fix)

    @classmethod
    def error(cls, what: str, fix: str = "") -> Finding:
        """Return a finding about something that does not work."""
        return cls(level=Level.ERROR, what=what, fix=fix)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentEvent:
    """Something that happened to an agent, as observers and ``GET /agents/NAME/events`` see it.

    :ivar kind: created, starting, ready, suspended, hibernated, resumed, stopping, stopped, failed, died,
        out-of-memory, adopted, unreachable, reachable, outdated, moved, reset, removed.
    """

    time: float
    agent: str
    user: str
    app: str
    kind: str
    detail: str = ""
