"""The journal of an agent: what another manager needs to adopt it.

The journal is append-only.  Its first line is written before anything starts; the manager adds a line when the
agent runs and when it begins to stop it.  bubblewrap itself writes a second file, the status: the pid of the
namespace's init and, at the end, the exit code.  So after the manager was killed, the next one reads what
happened.  An agent has neither file open.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.plugin import Deadline, DeadlineExceeded
from dispatcher_subprocess.errors import failed, unreadable

VERSION = 1
SUFFIX = ".agent"
_FIX = "free some space, or repair the state directory"
_LOCKS: dict[str, threading.RLock] = {}
_LOCKS_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, named by pid and start time (clock ticks after boot)."""

    pid: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One agent's latest run.

    :ivar main: what the manager started (the outer bwrap, or the app itself); None: the start was interrupted.
    :ivar init: first process of the agent's pid namespace, None without one; :ivar pidns: its inode.
    :ivar token: random, in the environment of every process of the run.
    :ivar helper: the process that carries the network, None without one.
    :ivar pipe: inode of the pipe that its output goes to.
    :ivar status: path of the file that bubblewrap writes.
    :ivar stop_requested: the manager is stopping it.
    :ivar ended: why it ended by itself, "" if it was stopped, None if that is not recorded yet.
    """

    name: str
    agent: str
    boot: str
    spec_hash: str
    uid: int
    endpoint: str
    owner_uid: int | None
    log_dir: str
    run_dir: str
    token: str
    network: str
    sandboxed: bool
    status: str
    pipe: int
    started_at: float | None = None
    main: Process | None = None
    init: Process | None = None
    pidns: int = 0
    helper: Process | None = None
    stop_requested: bool = False
    ended: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxStatus:
    """The status file: pid of the init, inode of its pid namespace, exit code; 0 or None while unknown."""

    child: int = 0
    pidns: int = 0
    exit_code: int | None = None


def parse(text: bytes) -> Record | None:
    """Parse a journal; None if its first line is incomplete (the start never began)."""
    documents = _documents(text)
    if not documents or documents[0].get("version") != VERSION:
        return None
    known: dict[str, Any] = {}
    for document in documents:
        known |= document
    del known["version"]
    for key in ("main", "init", "helper"):
        if known.get(key):
            known[key] = Process(**known[key])
    return Record(**known)


def sandbox_status(record: Record) -> SandboxStatus:
    """Return what bubblewrap wrote about a run."""
    try:
        documents = _documents(Path(record.status).read_bytes())
    except OSError:
        return SandboxStatus()
    known: dict[str, Any] = {}
    for document in documents:
        known |= document
    return SandboxStatus(
        child=known.get("child-pid", 0), pidns=known.get("pid-namespace", 0), exit_code=known.get("exit-code")
    )


def _documents(text: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, up to one that is incomplete because its writer was killed."""
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            document = json.loads(line)
        except ValueError:
            break
        if isinstance(document, dict):
            found.append(document)
    return found


class Journals:
    """All journals of an installation, in one private directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        """Return the journal of a backend name; such a name is legal as a file name."""
        return self.directory / f"{name}{SUFFIX}"

    def prepare(self) -> None:
        """Make the directory.

        :raises ProviderError: it cannot be made.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise failed(f"Cannot write {self.directory}", error, fix=_FIX) from error

    def names(self) -> list[str]:
        """Return the backend names that have a journal.

        :raises Unavailable: the directory cannot be read.
        """
        try:
            return sorted(
                name.removesuffix(SUFFIX) for name in os.listdir(self.directory) if name.endswith(SUFFIX)
            )
        except FileNotFoundError:
            return []
        except OSError as error:
            raise unreadable(self.directory, error) from error

    def read(self, name: str) -> Record | None:
        """Return an agent's record, None when there is none.

        :raises Unavailable: it cannot be read.
        """
        try:
            return parse(self.path(name).read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreadable(self.path(name), error) from error

    def records(self) -> Iterator[Record]:
        """Return the records of all agents.

        :raises Unavailable: they cannot be read.
        """
        return filter(None, map(self.read, self.names()))

    def status_path(self, name: str) -> Path:
        """Return the file that bubblewrap writes."""
        return self.directory / f"{name}.status"

    def suspended_path(self, name: str) -> Path:
        """Return the file that lists the processes which were stopped before the agent was suspended."""
        return self.directory / f"{name}.suspended"

    def begin(self, record: dict[str, Any]) -> int:
        """Begin a new journal in the place of an old one; return the descriptor of the new status file.

        :raises ProviderError: they cannot be written.
        """
        path, status = self.path(record["name"]), self.status_path(record["name"])
        new = path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            for old in (new, status):
                with contextlib.suppress(FileNotFoundError):
                    old.unlink()
            fd = os.open(new, flags, 0o600)
            try:
                _append(fd, {"version": VERSION, "status": str(status)} | record)
            finally:
                os.close(fd)
            fd = os.open(status, flags, 0o600)
            try:
                new.rename(path)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise failed(f"Cannot write {path}", error, fix=_FIX) from error
        return fd

    def append(self, name: str, document: dict[str, Any]) -> None:
        """Add to an agent's journal, if it has one.

        :raises ProviderError: it cannot be written.
        """
        path = self.path(name)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as error:
            raise failed(f"Cannot write {path}", error, fix=_FIX) from error
        try:
            _append(fd, document)
        except OSError as error:
            raise failed(f"Cannot write {path}", error, fix=_FIX) from error
        finally:
            os.close(fd)

    def remove(self, name: str) -> None:
        """Remove a journal; absent is success."""
        for path in (self.path(name), self.status_path(name), self.suspended_path(name)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def lock(self, name: str) -> threading.RLock:
        """Return the lock of an agent, shared by all instances in this process."""
        with _LOCKS_LOCK:
            return _LOCKS.setdefault(str(self.path(name)), threading.RLock())

    @contextlib.contextmanager
    def locked(self, name: str, deadline: Deadline) -> Iterator[None]:
        """Hold an agent's lock.

        :raises DeadlineExceeded: another operation holds it, or no time is left.
        """
        lock = self.lock(name)
        if deadline.expired:
            raise DeadlineExceeded(f"No time is left for {name}", fix="try again")
        if not lock.acquire(timeout=deadline.remaining()):
            raise DeadlineExceeded(f"Another operation on {name} is under way", fix="try again")
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def try_locked(self, name: str, seconds: float = 0.0) -> Iterator[bool]:
        """Take an agent's lock if that is possible within some seconds; yield whether it is held."""
        lock = self.lock(name)
        held = lock.acquire(timeout=seconds)
        try:
            yield held
        finally:
            if held:
                lock.release()


def _append(fd: int, document: dict[str, Any]) -> None:
    line = json.dumps(document).encode() + b"\n"
    if os.write(fd, line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
