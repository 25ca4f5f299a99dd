"""The supervisor: what the REST interface and the feed may ask of the agents' lifecycle.

It owns the agents' records and threads; the work is done by `operations`, `reconciler`, `idle` and `moves`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dispatcher.accounts import HostAccounts
from dispatcher.clock import SteadyWallClock
from dispatcher.config import Config
from dispatcher.manager.database import Database
from dispatcher.manager.store import AgentRow, Store
from dispatcher.manager.views import AgentView
from dispatcher.model import AgentEvent, Finding
from dispatcher.paths import Paths
from dispatcher.plugins import Plugins


class Supervisor:
    """Keeps every agent as it is desired.  All methods may be called from any thread.

    The database must have been opened with `dispatcher.manager.store` imported.  `clock` should come from
    `dispatcher.manager.store.steady_clock`, so that times of an earlier process of this boot agree.
    """

    def __init__(
        self,
        *,
        config: Config,
        paths: Paths,
        accounts: HostAccounts,
        plugins: Plugins,
        database: Database,
        clock: SteadyWallClock,
    ) -> None:
        self.store = Store(database)
        self.installation: str = ""
        raise NotImplementedError

    def start(self) -> None:
        """Take control: recover, adopt, begin to reconcile.  Returns once in control."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop all threads.  Agents go on."""
        raise NotImplementedError

    # --- intents: written before anything is done, return at once

    def create(self, name: str, *, app: str | None, password_hash: str | None) -> AgentRow:
        """Make an agent, stopped, and its user when that is new.

        `name` is ``USER`` or ``USER:APP``.  A user's first agent is called as the user, a further one
        ``USER:APP``: `create("alice", app="lab")` makes ``alice:lab`` when ``alice`` is of another app.

        :param password_hash: of a new user; None where an external authenticator knows it.
        :raises Conflict: it exists, is being removed, or a password came for a user who exists.
        :raises BadRequest: a bad name, or no app was named and none is the default.
        """
        raise NotImplementedError

    def remove(self, agent: str, *, keep_data: bool) -> None:
        """Let an agent go, with its user when it was the last one.

        :raises NotFound: there is no such agent.
        """
        raise NotImplementedError

    def set_desired(self, agent: str, state: str, *, stdin: bytes | None = None) -> None:
        """Say what an agent shall be: running, suspended, hibernated or stopped.  The newest intent wins.

        "running" also forgets a failure and the count of restarts.

        :param stdin: the login's credentials for apps that take them; kept in memory only.
        :raises NotFound: there is no such agent.
        :raises BadRequest: no such state.
        :raises Unsupported: its provider cannot do that.
        :raises Conflict: it is being removed, or shall sleep and does not run.
        """
        raise NotImplementedError

    def restart(self, agent: str) -> None:
        """Stop an agent, renew it when it is outdated, start it."""
        raise NotImplementedError

    def reset_data(self, agent: str) -> None:
        """Stop an agent, delete its data, and start it again if it shall run."""
        raise NotImplementedError

    def wake(self, agent: str) -> None:
        """Somebody sent a request: start or resume the agent.  Cheap and idempotent; unknown names are ignored.

        An agent that has failed is left alone until its back-off is over, or somebody starts it on purpose.
        """
        raise NotImplementedError

    def touch(self, agent: str, activity: Mapping[str, int]) -> None:
        """Count activity by class (feed.md); unknown names are ignored."""
        raise NotImplementedError

    def suspect(self, agent: str) -> None:
        """The edge could not connect: observe the agent now; unknown names are ignored."""
        raise NotImplementedError

    # --- what is

    def view(self, agent: str) -> AgentView:
        """Return an agent as it is; never blocks.

        :raises NotFound: there is no such agent.
        """
        raise NotImplementedError

    def views(self, *, user: str | None = None) -> list[AgentView]:
        """Return all agents, or a user's (the oldest first); never blocks."""
        raise NotImplementedError

    def wait(self, agent: str, done: Callable[[AgentView | None], bool], seconds: float) -> AgentView | None:
        """Wait until `done(view)` is true (None: the agent is gone) or `seconds` are over; return the last view.

        `done` must be quick and must not call the supervisor.

        :raises NotFound: there is no such agent at the beginning.
        """
        raise NotImplementedError

    def subscribe(self, on_change: Callable[[str], None]) -> None:
        """Call `on_change(agent name)` whenever a view changed or an agent is gone: from any thread; be quick."""
        raise NotImplementedError

    def runtime(self, agent: str) -> dict[str, Any]:
        """Return handle, endpoint, uid, provider, started_at, spec hash and usage."""
        raise NotImplementedError

    def logs(self, agent: str, *, tail: int, after: str | None) -> tuple[list[str], str]:
        """Return the last lines, or those after a cursor, and the cursor for the next call.

        :raises Unsupported: the provider keeps no logs.
        """
        raise NotImplementedError

    def events(self, agent: str, limit: int) -> list[AgentEvent]:
        """Return the last events, newest last."""
        raise NotImplementedError

    def why(self, agent: str) -> list[str]:
        """Say in plain sentences why an agent is in its state and what happens next."""
        raise NotImplementedError

    def memory_usage(self) -> dict[str, Any]:
        """Return ``{"total", "average", "agents": [{"name", "memory"}]}`` in bytes."""
        raise NotImplementedError

    def top(self) -> list[dict[str, Any]]:
        """Return ``[{"name", "state", "memory", "cpu_percent", "cpu_seconds", "last_used"}]``."""
        raise NotImplementedError

    def copies(self, agent: str) -> list[dict[str, Any]]:
        """Return the old copies of data that moves kept: ``[{"id", "provider", "kind", "time"}]``."""
        raise NotImplementedError

    def purge_copies(self, agent: str) -> int:
        """Delete the old copies and return how many there were.

        :raises Conflict: an operation is being done on the agent.
        """
        raise NotImplementedError

    def providers(self) -> list[dict[str, Any]]:
        """Return ``[{"name", "isolation", "capabilities", "distribution", "usable", "error"}]``."""
        raise NotImplementedError

    def check_provider(self, name: str, app: str | None) -> list[Finding]:
        """Return what a provider isolates and what not, for one app or as a whole.

        :raises NotFound: there is no such provider or app.
        """
        raise NotImplementedError

    def apply_config(self, config: Config) -> list[str]:
        """Use a new configuration from now on; return in sentences what changed.

        :raises ConfigError: it is wrong; nothing was changed.
        """
        raise NotImplementedError
