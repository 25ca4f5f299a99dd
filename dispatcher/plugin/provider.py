"""The provider contract, version 1.  Pure declaration: plugins subclass `Provider`, the core calls it.

Synchronous on purpose: the manager supplies the threads, a pool per provider.  A method may be called from
any thread, for different agents at the same time, never twice at once for one agent (except `observe`,
`logs`, `usage` and `list`, which may run beside anything).

Rules that hold everywhere:

- `deadline` bounds the call.  Past it a method raises `DeadlineExceeded` and leaves what it began in a
  state that the next `ensure`, `stop` or `destroy` finishes.
- `progress(step, detail="", fraction=None)` is called at least once a second on long work; it raises
  `Cancelled`, upon which the method cleans up what it began and lets the exception through.
- A backend that cannot be asked raises `Unavailable`; one that refuses raises `ProviderError` with what to
  do next.  No SDK exception escapes (`raise ... from`).
- `stop`, `destroy`, `list` and `observe` work from the handle alone, without the app's configuration.

What an app finds, alike with every provider, so that moving it to another is one line:

- `{socket}`, `{port}` and `{data}` in its command (and in `App.environment` values) are replaced by the path
  of its Unix socket, its TCP port and its data directory, as they are seen from inside;
- its environment is `App.environment` (byte for byte but for those placeholders), `HOME` (the data directory,
  also the working directory, unless the options say otherwise), `DISPATCHER_AGENT`, `DISPATCHER_USER`,
  `DISPATCHER_DATA` and, when there are secrets, `DISPATCHER_SECRETS`: a directory in memory with one file per
  secret, readable by the agent alone; nothing of the manager's own environment;
- its standard input is `AgentSpec.stdin` and then its end; empty without credentials.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from pydantic import BaseModel

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Unsupported
from dispatcher.plugin.model import (
    AgentSpec,
    App,
    Capability,
    Depth,
    Finding,
    Handle,
    Isolation,
    Observation,
    Usage,
)

API_VERSION = 1


class Progress(Protocol):
    """Tells how far long work is; raises `Cancelled` when the work is no longer wanted."""

    def __call__(self, step: str, detail: str = "", fraction: float | None = None) -> None:
        """Report one step: a short word or two, one more detail, how much is done (0 to 1)."""


class Closeable(Protocol):
    """What `watch` returns."""

    def close(self) -> None:
        """Stop and release; idempotent."""


def no_progress(step: str, detail: str = "", fraction: float | None = None) -> None:
    """Progress that nobody watches and nobody cancels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderContext:
    """What the core gives every provider.

    :ivar installation: 8 hexadecimal digits, in every label and backend name.
    :ivar state_dir: private to the provider, kept over restarts; :ivar run_dir: private, emptied at boot.
    :ivar proxy_gid: group of the proxy, which must be able to connect to endpoints.
    :ivar privileged: whether the manager runs as root.
    """

    installation: str
    state_dir: Path
    run_dir: Path
    proxy_gid: int
    privileged: bool
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("dispatcher.plugin.provider"))


class Provider(ABC):
    """Isolates agents.  One instance per installation and provider name."""

    name: ClassVar[str]
    api_version: ClassVar[int] = API_VERSION
    isolation: ClassVar[Isolation]
    #: Validates ``[providers.NAME]``: the backend.  Forbid extra keys.
    Options: ClassVar[type[BaseModel]]
    #: Validates ``[apps.X.NAME]``: image, command, port, ...  Forbid extra keys.
    AppOptions: ClassVar[type[BaseModel]]

    def __init__(self, *, context: ProviderContext, options: BaseModel) -> None:
        """Keep the arguments.  Must not touch the backend: `check` does."""
        self.context = context
        self.options = options

    @property
    @abstractmethod
    def capabilities(self) -> frozenset[Capability]:
        """What works here and now; may depend on the machine, must not block, constant between `check`s."""

    @abstractmethod
    def check(self, *, deadline: Deadline) -> None:
        """Return when the backend is usable.

        :raises Unavailable: it does not answer; the error says what to do.
        :raises ProviderError: it answers and cannot be used (too old, no permission, ...).
        """

    @abstractmethod
    def explain(self, app: App | None) -> Sequence[Finding]:
        """Say in words what is isolated from what, and what is not: for one app, or the backend as a whole."""

    @abstractmethod
    def prepare(self, app: App, *, deadline: Deadline, progress: Progress) -> None:
        """Pull, build or verify what the app starts from; idempotent, cheap when nothing is to do."""

    @abstractmethod
    def handle(self, spec: AgentSpec) -> Handle:
        """Return the handle that an agent of this spec has or will have.  Pure: does not ask the backend.

        Enough for `observe`, `stop`, `destroy` and `import_data`, even when the agent does not exist yet.
        """

    @abstractmethod
    def ensure(self, spec: AgentSpec, *, deadline: Deadline, progress: Progress) -> Handle:
        """Make the agent exist and run, resumed if it was asleep.  Idempotent: one agent, however often called.

        Returns when it runs, not when it is ready.  A stopped agent of another spec is replaced.

        :raises SpecConflict: it runs or sleeps with another spec.
        :raises Cancelled: by `progress`; nothing is left behind that was not there before.
        """

    @abstractmethod
    def observe(self, handle: Handle, *, deadline: Deadline) -> Observation:
        """Ask the backend how the agent is.

        An agent that does not exist is `ABSENT`, after a restart of the manager too.  The endpoint is set
        whenever the agent is running or suspended and the backend knows it.

        :raises Unavailable: the backend cannot be asked; never guess *stopped*.
        """

    @abstractmethod
    def stop(self, handle: Handle, *, grace: float, deadline: Deadline, progress: Progress) -> None:
        """End the agent and every process of it: politely for `grace` seconds, then by force.  Absent is success.

        Data stays.  The agent may exist afterwards (`STOPPED`) or not (`ABSENT`).
        """

    @abstractmethod
    def destroy(self, handle: Handle, *, data: bool, deadline: Deadline, progress: Progress) -> None:
        """Remove the agent and all that belongs to it on the backend.  Absent is success.

        :param data: also delete the data that the provider itself keeps (a volume, a disk image).  The
            canonical directory belongs to the core, which deletes it.
        """

    @abstractmethod
    def list(self, *, deadline: Deadline) -> Iterable[tuple[Handle, Observation]]:
        """Return all agents of this installation, known to the store or not, in few backend calls.

        :raises Unavailable: the backend cannot be asked.
        """

    def suspend(self, handle: Handle, *, depth: Depth, deadline: Deadline, progress: Progress) -> None:
        """Freeze the agent, its memory kept in RAM or on disk.  Asleep already at that depth is success."""
        raise self.unsupported(Capability.SUSPEND if depth is Depth.RAM else Capability.HIBERNATE)

    def resume(self, handle: Handle, *, deadline: Deadline, progress: Progress) -> None:
        """Thaw the agent.  Running already is success.

        :raises NotFound: it does not exist any more; the core then calls `ensure`.
        """
        raise self.unsupported(Capability.SUSPEND)

    def logs(self, handle: Handle, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
        """Yield the last `tail` lines of the agent's output, then (with `follow`) new ones until the deadline.

        Lines come without their end, at most 64 KiB each.  An absent agent yields what is still known.
        """
        raise self.unsupported(Capability.LOGS)

    def usage(self, handles: Sequence[Handle], *, deadline: Deadline) -> Mapping[str, Usage]:
        """Return usage by `Handle.name`, in few calls where the backend allows; the gone are left out."""
        raise self.unsupported(Capability.USAGE)

    def watch(self, on_change: Callable[[str], None]) -> Closeable:
        """Call `on_change(handle name)` from a thread of the provider whenever an agent changed by itself.

        Reconnects by itself; after a gap it reports ``""``: everything may have changed.
        """
        raise self.unsupported(Capability.EVENTS)

    def export_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        """Copy the stopped agent's data into the empty `directory`: owners, modes, times and links kept."""
        raise self.unsupported(Capability.OWN_DATA)

    def import_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        """Replace the stopped (or not yet existing) agent's data by a copy of `directory`."""
        raise self.unsupported(Capability.OWN_DATA)

    def close(self) -> None:
        """Release connections and threads.  Agents go on."""

    def unsupported(self, capability: Capability) -> Unsupported:
        """Return the error for a capability that is not declared."""
        return Unsupported(
            f"The provider {self.name} cannot do this",
            why=f"it has no capability {capability.value!r}",
            fix="see `dispatcher providers list` for what each provider can do",
        )
