"""The provider contract, version 1: plugins subclass `Provider`, the core calls it.

Methods are synchronous; the manager has a pool of threads for each provider.  A method can be called from any
thread, for different agents at the same time, but not concurrently for one agent (except `observe`, `logs`,
`usage` and `list`).

Rules for all methods:

- `deadline` bounds the call.  When it has passed, a method raises `DeadlineExceeded`; the next `ensure`, `stop` or
  `destroy` completes the work.
- `progress(step, detail="", fraction=None)` is called at least once a second in a long operation.  When it raises
  `Cancelled`, the method undoes what it began and lets the exception through.
- If the backend does not answer, a method raises `Unavailable`; if the backend refuses, a `ProviderError` with a
  fix.  Exceptions of an SDK are translated (`raise ... from`).
- `stop`, `destroy`, `list` and `observe` work from the handle alone, without the app's configuration.

Every provider gives an app the same environment, so that a move to another provider changes one line:

- `{socket}`, `{port}` and `{data}` in its command (and in values of `App.environment`) are replaced by the path of
  its Unix socket, its TCP port and its data directory, as seen from inside;
- its environment variables are those of `App.environment` (byte for byte except for these placeholders), `HOME`
  (the data directory, which is also the working directory, unless others are set), `USER`, `LOGNAME`, `SHELL`,
  those of `AgentSpec.variables` and, where `/tmp` is small, `TMPDIR` (in the data directory, see
  `make_temporary`); none of the manager's.  `DISPATCHER_SECRETS` names a directory in memory with a file per
  secret, readable only by the agent;
- programs that run as another user (root) before the app do not see these variables: the agent can write to the
  files that its `PATH` or `LD_PRELOAD` names;
- its umask is 007 unless its options or the image set another: the proxy's group may connect to its socket, and
  others may read nothing;
- its standard input is `AgentSpec.stdin`, then end of file; it is empty without credentials.
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

#: Versions of the contract that this release accepts, the oldest first.
API_VERSIONS = range(1, 2)
#: The newest of them.
API_VERSION = API_VERSIONS[-1]


class Progress(Protocol):
    """Reports the progress of a long operation; raises `Cancelled` when it was cancelled."""

    def __call__(self, step: str, detail: str = "", fraction: float | None = None) -> None:
        """Report a step: one or two words, a detail, the fraction that is done (0 to 1)."""


class Closeable(Protocol):
    """What `watch` returns."""

    def close(self) -> None:
        """Stop and release; idempotent."""


def no_progress(step: str, detail: str = "", fraction: float | None = None) -> None:
    """Progress that is neither shown nor cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderContext:
    """Values that every provider gets from the core.

    :ivar installation: 8 hexadecimal digits, in every label and backend name.
    :ivar state_dir: private to the provider, kept across reboots.
    :ivar run_dir: private, emptied at boot.
    :ivar proxy_gid: group of the proxy, which connects to endpoints.
    :ivar privileged: whether the manager runs as root.
    :ivar log: logger for the provider's messages.
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
    #: Version of the contract that the class follows; a class that does not set it follows version 1.
    api_version: ClassVar[int] = 1
    isolation: ClassVar[Isolation]
    #: Validates ``[providers.NAME]``: the backend.  Forbid extra keys.
    Options: ClassVar[type[BaseModel]]
    #: Validates ``[apps.X.NAME]``: image, command, port, ...  Forbid extra keys.
    AppOptions: ClassVar[type[BaseModel]]

    def __init__(self, *, context: ProviderContext, options: BaseModel) -> None:
        """Keep the arguments.  Must not use the backend: `check` does."""
        self.context = context
        self.options = options

    @property
    @abstractmethod
    def capabilities(self) -> frozenset[Capability]:
        """Features that work on this machine.  Must not block; may change only in `check`."""

    @abstractmethod
    def check(self, *, deadline: Deadline) -> None:
        """Return None if the backend is usable.

        :raises Unavailable: the backend does not answer.
        :raises ProviderError: the backend answers but cannot be used (too old, no permission, ...).
        """

    @abstractmethod
    def explain(self, app: App | None) -> Sequence[Finding]:
        """Describe what is isolated and what is not, for one app or for the backend as a whole."""

    def faults(self, app: App) -> Iterable[str]:
        """Return the reasons why no agent of the app could start on this host, without a call to the backend.

        Each text begins with the full path of a key.  `config check`, `providers check --app` and the manager's
        log report them.
        """
        return ()

    @abstractmethod
    def prepare(self, app: App, *, deadline: Deadline, progress: Progress) -> None:
        """Pull, build or verify the image; idempotent, and fast when there is nothing to do."""

    @abstractmethod
    def handle(self, spec: AgentSpec) -> Handle:
        """Return the handle that an agent of this spec has or will have, without a call to the backend.

        `observe`, `stop`, `destroy` and `import_data` accept the handle before the agent exists.
        """

    @abstractmethod
    def ensure(self, spec: AgentSpec, *, deadline: Deadline, progress: Progress) -> Handle:
        """Create and start the agent, or resume it if it is suspended.  Idempotent.

        Returns when the agent runs; the core waits until it is ready.  Replaces a stopped agent of another spec.

        :raises SpecConflict: the agent runs, or is suspended, with another spec.
        :raises Cancelled: `progress` raised it; nothing that `ensure` created is left.
        """

    @abstractmethod
    def observe(self, handle: Handle, *, deadline: Deadline) -> Observation:
        """Return the state of the agent on the backend.

        An agent that does not exist is `ABSENT`, also after a restart of the manager.  The endpoint is set when
        the agent is running or suspended and the backend knows it.

        :raises Unavailable: the backend does not answer; *stopped* is never assumed.
        """

    @abstractmethod
    def stop(self, handle: Handle, *, grace: float, deadline: Deadline, progress: Progress) -> None:
        """Stop the agent and all its processes: with SIGTERM or its equivalent, after `grace` seconds by force.

        Succeeds if the agent is absent.  Data stays.  Afterwards the agent is `STOPPED` or `ABSENT`.
        """

    @abstractmethod
    def destroy(self, handle: Handle, *, data: bool, deadline: Deadline, progress: Progress) -> None:
        """Remove the agent and everything that belongs to it on the backend.  Succeeds if the agent is absent.

        :param data: also delete the data that the provider keeps itself (a volume, a disk image) and its log
            files.  The core deletes the canonical directory.
        """

    @abstractmethod
    def list(self, *, deadline: Deadline) -> Iterable[tuple[Handle, Observation]]:
        """Return all agents of this installation, in the database or not, in few backend calls.

        :raises Unavailable: the backend does not answer.
        """

    def suspend(self, handle: Handle, *, depth: Depth, deadline: Deadline, progress: Progress) -> None:
        """Suspend the agent and keep its memory, in RAM or on disk.  Succeeds if it is suspended at that depth.

        :raises NotFound: the agent does not exist, or has ended.
        """
        raise self.unsupported(Capability.SUSPEND if depth is Depth.RAM else Capability.HIBERNATE)

    def resume(self, handle: Handle, *, deadline: Deadline, progress: Progress) -> None:
        """Resume the agent.  Succeeds if it is running.

        :raises NotFound: the agent no longer exists, or has ended; the core then calls `ensure`.
        """
        raise self.unsupported(Capability.SUSPEND)

    def logs(self, handle: Handle, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
        """Yield the last `tail` lines of the agent's output, then (with `follow`) new ones until the deadline.

        Lines are without line end and at most 64 KiB long.  For an absent agent, yield what is still available.
        """
        raise self.unsupported(Capability.LOGS)

    def usage(self, handles: Sequence[Handle], *, deadline: Deadline) -> Mapping[str, Usage]:
        """Return usage by `Handle.name`, in few calls if possible; agents that do not exist are left out."""
        raise self.unsupported(Capability.USAGE)

    def listeners(self, handle: Handle, *, deadline: Deadline) -> Sequence[str]:
        """Return where the processes of a running agent listen, as endpoints seen from inside the agent.

        For example ``tcp:127.0.0.1:8888`` or ``unix:/tmp/app.sock``.  Called when an app does not answer at its
        endpoint: the error names what was found.  An empty result means that the provider cannot tell.
        """
        return ()

    def watch(self, on_change: Callable[[str], None]) -> Closeable:
        """Call `on_change(handle name)` from a thread of the provider when an agent has changed by itself.

        Reconnects to the backend by itself, and then reports ``""``: any agent may have changed in between.
        """
        raise self.unsupported(Capability.EVENTS)

    def export_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        """Copy the stopped agent's data into the empty `directory`, with owners, modes, times and links."""
        raise self.unsupported(Capability.OWN_DATA)

    def import_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        """Replace the data of the stopped (or not yet existing) agent with a copy of `directory`."""
        raise self.unsupported(Capability.OWN_DATA)

    def close(self) -> None:
        """Release connections and threads.  Agents keep running."""

    def unsupported(self, capability: Capability) -> Unsupported:
        """Return the error for a capability that is not declared."""
        return Unsupported(
            f"The provider {self.name} cannot do this",
            why=f"it has no capability {capability.value!r}",
            fix="see `dispatcher providers list` for what each provider can do",
        )
