"""The directories of agents and their modes: data, logs and old copies in STATE_DIR/agents, sockets in RUN_DIR/a.

Parents belong to the manager and can only be traversed; the contents of an agent's data and socket directories
belong to the agent and are not trusted (`safe_tree`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from dispatcher.config.host_users import HostAccounts
from dispatcher.config.layout import Paths
from dispatcher.manager.files.quota import DiskUse, Quotas
from dispatcher.manager.files.safe_tree import change_owner, exists, make_directory
from dispatcher.manager.files.socket_tmpfs import SocketTmpfs
from dispatcher.plugin import names
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Conflict, DispatcherError
from dispatcher.plugin.tree_removal import Tick, remove_tree

TRAVERSE = 0o711  # others may traverse, not list
PRIVATE = 0o700
SOCKET_DIR = 0o2710  # of the agent, and of the group of the proxy: sockets inherit the group
TRASH = ".trash"


def provider_dirs(paths: Paths, provider: str) -> tuple[Path, Path]:
    """Make and return a provider's private directories: kept over restarts, and emptied at boot."""
    state, run = paths.provider_state(provider), paths.provider_run(provider)
    for directory in (state, run):
        os.makedirs(directory.parent, TRAVERSE, exist_ok=True)
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
        self._socket_dirs = paths.run_dir / "a"
        self.sockets = SocketTmpfs(self._socket_dirs, privileged=self._privileged)
        self.quotas = Quotas(self._agents, privileged=self._privileged)
        self._leftovers: list[str] = []  # of interrupted deletions of an earlier manager

    def begin(self, *, new_boot: bool) -> None:
        """Make the parent directories; after a boot of the host, empty those that are valid for one boot only."""
        for directory in (self._agents, self._socket_dirs):
            os.makedirs(directory.parent, TRAVERSE, exist_ok=True)
            make_directory(directory, TRAVERSE)
        make_directory(self._agents / TRASH, PRIVATE)
        self._leftovers = [entry.path for entry in os.scandir(self._agents / TRASH)]
        if new_boot:
            for directory in (self._socket_dirs, self.paths.run_dir / "p"):
                for entry in list(os.scandir(directory)) if directory.exists() else ():
                    remove_tree(entry.path)
        self.sockets.open()

    def ids(self, uid: int) -> tuple[int, int]:
        """Return the user and group id of an agent whose host user id is `uid`."""
        return (uid, uid) if self._privileged else (os.geteuid(), os.getegid())

    def _owner(self, uid: int) -> tuple[int, int] | None:
        return self.ids(uid) if self._privileged else None

    def data_dir(self, agent: str) -> Path:
        """Return the canonical data directory."""
        return self.paths.agent_dir(agent) / "data"

    def log_dir(self, agent: str) -> Path:
        """Return the directory of a provider's log files."""
        return self.paths.agent_dir(agent) / "log"

    def prepare(self, agent: str, uid: int) -> None:
        """Make every directory that a start needs, with its owner and mode; cheap when they exist."""
        owner = self.ids(uid)
        home = self.paths.agent_dir(agent)
        make_directory(home, TRAVERSE)
        make_directory(home / "log", PRIVATE)
        data = home / "data"
        if self._privileged and exists(data) and os.lstat(data).st_uid != owner[0]:
            change_owner(data, owner)  # from an unprivileged manager, or a restored backup
        make_directory(data, PRIVATE, owner)
        self._prepare_socket_dir(agent, owner)

    def limit(self, agent: str, uid: int, limit: int | None, tick: Tick) -> None:
        """Limit and count an agent's data; None: only count, where that is possible.

        :raises Unsupported: the file system cannot.
        """
        self.quotas.apply(self.data_dir(agent), self.ids(uid)[0], limit, tick)

    def usage(self, agent: str, uid: int) -> DiskUse | None:
        """Return what an agent's data takes; None where it is not counted."""
        return self.quotas.usage(self.data_dir(agent), self.ids(uid)[0])

    def _prepare_socket_dir(self, agent: str, owner: tuple[int, int]) -> None:
        directory = self.paths.endpoint_dir(agent)
        if not self._privileged:
            make_directory(directory, PRIVATE)
            return
        try:
            stale = os.lstat(directory).st_uid not in {owner[0], 0}
        except FileNotFoundError:
            stale = False
        if stale:
            remove_tree(directory, deadline=Deadline(30))
        try:
            make_directory(directory, SOCKET_DIR, (owner[0], self._proxy_gid))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise self.sockets.full() from error

    def reset(self, agent: str, uid: int, tick: Tick | None = None) -> None:
        """Delete an agent's data; an empty directory is in place before the old one is deleted."""
        data = self.data_dir(agent)
        if exists(data):
            self._move_to_trash(agent, data)
        make_directory(self.paths.agent_dir(agent), TRAVERSE)
        make_directory(data, PRIVATE, self._owner(uid))
        self._empty_trash_of(agent, tick)

    def remove(self, agent: str, *, keep_data: bool, tick: Tick | None = None) -> None:
        """Delete all directories of an agent; with `keep_data` its data and old copies stay."""
        remove_tree(self.paths.endpoint_dir(agent), tick=tick)
        owner = self.owner(agent)
        home = self.paths.agent_dir(agent)
        if keep_data:
            remove_tree(home / "log", tick=tick)
        else:
            if exists(home):
                self._move_to_trash(agent, home)
            self._empty_trash_of(agent, tick)
            if owner is not None:
                self.quotas.forget(owner)

    def _move_to_trash(self, agent: str, directory: Path) -> None:
        os.rename(directory, self._agents / TRASH / f"{names.key(agent)}.{secrets.token_hex(8)}")

    def _empty_trash_of(self, agent: str, tick: Tick | None) -> None:
        """Delete what was moved to the trash for an agent, by an earlier attempt too."""
        for entry in list(os.scandir(self._agents / TRASH)):
            if entry.name.startswith(f"{names.key(agent)}."):
                remove_tree(entry.path, tick=tick)

    def owner(self, agent: str) -> int | None:
        """Return the host user id that owns the data in the place of a new agent; None if there is none."""
        try:
            found = os.lstat(self.data_dir(agent))
        except FileNotFoundError:
            return None
        return found.st_uid if stat.S_ISDIR(found.st_mode) else None

    def owners(self) -> set[int]:
        """Return the host user ids that own data, of agents that the database does not know too."""
        found = set()
        for home in os.scandir(self._agents):
            with contextlib.suppress(OSError):
                found.add(os.lstat(f"{home.path}/data").st_uid)
        return found

    def check_present(self, agent: str) -> None:
        """Check that the data of an agent that was in use is there: a disk may not be mounted, or not restored.

        :raises Conflict: it is missing.
        """
        data = self.data_dir(agent)
        if not exists(data):
            raise Conflict(
                f"The data of {names.printable(agent)} is missing",
                why=f"the agent was in use, and {data} does not exist",
                fix="mount or restore it and start the agent, or let it begin anew: `dispatcher reset-data`",
            )

    def empty_dir(self, agent: str, name: str) -> Path:
        """Make an empty directory of the manager beside the data, in place of an earlier one; return it."""
        home = self.paths.agent_dir(agent)
        directory = home / name
        make_directory(home, TRAVERSE)
        if directory.parent != home:
            make_directory(directory.parent, PRIVATE)
        remove_tree(directory)
        make_directory(directory, PRIVATE)
        return directory

    def copy_dir(self, agent: str, name: str) -> Path:
        """Return the directory of an old copy."""
        return self.paths.agent_dir(agent) / "copies" / name

    def store_copy(self, agent: str, uid: int, name: str) -> None:
        """Move an agent's data to its old copies, and make an empty directory.  Idempotent."""
        copy = self.copy_dir(agent, name)
        make_directory(copy.parent, PRIVATE)
        if not exists(copy):
            self.quotas.release(self.data_dir(agent), uid)
            os.rename(self.data_dir(agent), copy)
        make_directory(self.data_dir(agent), PRIVATE, self._owner(uid))

    def install(self, agent: str, uid: int, directory: Path, tick: Tick | None = None) -> None:
        """Make `directory`, exported by a provider, the data of an agent.  Idempotent.

        :raises DispatcherError: it contains a file that must not become the agent's.
        """
        if not exists(directory):
            return
        if self._privileged:
            change_owner(directory, self.ids(uid), tick)
        data = self.data_dir(agent)
        if exists(data):
            self._move_to_trash(agent, data)
        self._empty_trash_of(agent, tick)
        os.rename(directory, data)
        make_directory(data, PRIVATE, self._owner(uid))

    def remove_copy(self, agent: str, name: str) -> None:
        """Delete an old copy."""
        remove_tree(self.copy_dir(agent, name))

    def empty_trash(self) -> Iterator[str]:
        """Delete the leftovers of interrupted deletions; yield those that cannot be deleted, and why."""
        for path in self._leftovers:
            try:
                remove_tree(path)
            except (OSError, DispatcherError) as error:
                yield f"{path}: {error}"
        self._leftovers = []
