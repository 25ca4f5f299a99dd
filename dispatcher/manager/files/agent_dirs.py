"""The directories of agents: data, endpoint, logs, old copies.  Touches STATE_DIR/agents and RUN_DIR/a.

Parents belong to the manager and can only be passed through; what is inside an agent's data and endpoint
directories belongs to the agent and is never trusted (`trees`).
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from dispatcher.config.host_users import HostAccounts
from dispatcher.config.layout import Paths
from dispatcher.manager.files.safe_tree import Tick, exists, make_directory, remove_tree, take_over
from dispatcher.manager.files.socket_tmpfs import EndpointSpace
from dispatcher.manager.storage.agents import AgentRow
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError

PASS = 0o711  # others may pass through, not look
PRIVATE = 0o700
TRASH = ".trash"
DELETING = 3600.0  # seconds that the deletion of one tree may take


def provider_dirs(paths: Paths, provider: str) -> tuple[Path, Path]:
    """Make and return a provider's private directories: kept over restarts, and emptied at boot."""
    state, run = paths.provider_state(provider), paths.provider_run(provider)
    for directory in (state, run):
        os.makedirs(directory.parent, PASS, exist_ok=True)
        make_directory(directory, PRIVATE)
    return state, run


class AgentData:
    """Makes, resets and removes what an agent has on disk.

    :raises OSError: from any method, when the disk is full, read-only, ...
    """

    def __init__(self, paths: Paths, accounts: HostAccounts) -> None:
        self.paths = paths
        self._privileged = accounts.agent_uids is not None
        self._proxy_gid = accounts.proxy_gid
        self._agents = paths.state_dir / "agents"
        self._endpoints = paths.run_dir / "a"
        self.endpoints = EndpointSpace(self._endpoints, privileged=self._privileged)
        self._left: list[str] = []  # what interrupted deletions of an earlier manager left

    def begin(self, *, new_boot: bool) -> None:
        """Make the parents; after a boot of the host, empty what lives for one boot only."""
        for directory in (self._agents, self._endpoints):
            os.makedirs(directory.parent, PASS, exist_ok=True)
            make_directory(directory, PASS)
        make_directory(self._agents / TRASH, PRIVATE)
        self._left = [entry.path for entry in os.scandir(self._agents / TRASH)]
        if new_boot:
            for directory in (self._endpoints, self.paths.run_dir / "p"):
                for entry in list(os.scandir(directory)) if directory.exists() else ():
                    remove_tree(entry.path, deadline=Deadline(DELETING))
        self.endpoints.open()

    def ids(self, row: AgentRow) -> tuple[int, int]:
        """Return the user and group id of an agent."""
        return (row.uid, row.uid) if self._privileged else (os.geteuid(), os.getegid())

    def data_dir(self, agent: str) -> Path:
        """Return the canonical data directory."""
        return self.paths.agent_dir(agent) / "data"

    def log_dir(self, agent: str) -> Path:
        """Return the directory of a provider's log files."""
        return self.paths.agent_dir(agent) / "log"

    def prepare(self, row: AgentRow) -> None:
        """Make every directory that a start needs, with the right owner; cheap when they are there."""
        owner = self.ids(row)
        home = self.paths.agent_dir(row.name)
        make_directory(home, PASS)
        make_directory(home / "log", PRIVATE)
        data = home / "data"
        if self._privileged and exists(data) and os.lstat(data).st_uid != owner[0]:
            take_over(data, owner)  # what an ordinary user's manager left, or a restored backup
        make_directory(data, PRIVATE, owner)
        self._prepare_endpoint(row, owner)

    def _prepare_endpoint(self, row: AgentRow, owner: tuple[int, int]) -> None:
        endpoint = self.paths.endpoint_dir(row.name)
        if not self._privileged:
            make_directory(endpoint, PRIVATE)
            return
        try:
            stale = os.lstat(endpoint).st_uid not in {owner[0], 0}
        except FileNotFoundError:
            stale = False
        if stale:
            remove_tree(endpoint, deadline=Deadline(30))
        try:
            make_directory(endpoint, 0o2710, (owner[0], self._proxy_gid))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise self.endpoints.full() from error

    def reset(self, row: AgentRow, tick: Tick | None = None) -> None:
        """Delete an agent's data; its directory is there again, empty, before the old one is deleted."""
        data = self.data_dir(row.name)
        if exists(data):
            old = self._agents / TRASH / secrets.token_hex(8)
            os.rename(data, old)
            make_directory(data, PRIVATE, self.ids(row) if self._privileged else None)
            remove_tree(old, deadline=Deadline(DELETING), tick=tick)

    def remove(self, agent: str, *, keep_data: bool, tick: Tick | None = None) -> None:
        """Delete what an agent has; with `keep_data` its data and old copies stay."""
        remove_tree(self.paths.endpoint_dir(agent), deadline=Deadline(DELETING), tick=tick)
        home = self.paths.agent_dir(agent)
        if keep_data:
            remove_tree(home / "log", deadline=Deadline(DELETING), tick=tick)
        elif exists(home):
            old = self._agents / TRASH / secrets.token_hex(8)
            os.rename(home, old)
            remove_tree(old, deadline=Deadline(DELETING), tick=tick)

    def set_aside(self, agent: str) -> Path | None:
        """Move what nobody accounts for away from a new agent's place; return where to, None for nothing."""
        home = self.paths.agent_dir(agent)
        if not exists(home):
            return None
        aside = home.with_name(f"{home.name}.found-{secrets.token_hex(4)}")
        os.rename(home, aside)
        os.chmod(aside, PRIVATE)
        return aside

    def fresh(self, agent: str, name: str) -> Path:
        """Return an empty directory of the manager's own beside the data; whatever had its name is deleted."""
        home = self.paths.agent_dir(agent)
        directory = home / name
        make_directory(home, PASS)
        if directory.parent != home:
            make_directory(directory.parent, PRIVATE)
        remove_tree(directory, deadline=Deadline(DELETING))
        make_directory(directory, PRIVATE)
        return directory

    def copy_dir(self, agent: str, name: str) -> Path:
        """Return where an old copy lies."""
        return self.paths.agent_dir(agent) / "copies" / name

    def store_copy(self, row: AgentRow, name: str) -> None:
        """Move an agent's data to its old copies, and make an empty directory; done already is success."""
        copy = self.copy_dir(row.name, name)
        make_directory(copy.parent, PRIVATE)
        if not exists(copy):
            os.rename(self.data_dir(row.name), copy)
        make_directory(self.data_dir(row.name), PRIVATE, self.ids(row) if self._privileged else None)

    def install(self, row: AgentRow, directory: Path, tick: Tick | None = None) -> None:
        """Make `directory`, which came from a provider, an agent's data; done already is success.

        :raises DispatcherError: it holds something that must not become the agent's.
        """
        if not exists(directory):
            return
        if self._privileged:
            take_over(directory, self.ids(row), tick)
        data = self.data_dir(row.name)
        if exists(data):
            old = self._agents / TRASH / secrets.token_hex(8)
            os.rename(data, old)
            remove_tree(old, deadline=Deadline(DELETING), tick=tick)
        os.rename(directory, data)
        make_directory(data, PRIVATE, self.ids(row) if self._privileged else None)

    def remove_copy(self, agent: str, name: str) -> None:
        """Delete an old copy."""
        remove_tree(self.copy_dir(agent, name), deadline=Deadline(DELETING))

    def empty_trash(self) -> Iterator[str]:
        """Delete what deletions of an earlier manager left; yield what could not be deleted, and why."""
        for path in self._left:
            try:
                remove_tree(path, deadline=Deadline(DELETING))
            except (OSError, DispatcherError) as error:
                yield f"{path}: {error}"
        self._left = []
