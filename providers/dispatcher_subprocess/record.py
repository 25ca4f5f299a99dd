"""The journal of an agent: what is needed to adopt it.  Touches the provider's state directory.

The journal is append-only.  Its first line is written before anything starts; the manager adds a line when the
agent is up and when it asked it to end.  bubblewrap writes a second file, the status: the pid of the namespace's
init and, at the end, the exit code, without the manager's help.  So whenever the manager is killed, the next one
reads what happened.  An agent never holds either file.
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

from dispatcher.plugin import Deadline, DeadlineExceeded, ProviderError, Unavailable

VERSION = 1
SUFFIX = ".agent"
_LOCKS: dict[str, threading.RLock] = {}
_LOCKS_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, named by pid and start time (clock ticks after boot)."""

    pid: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of one agent's latest run.

    :ivar main: what the manager started (the outer bwrap, or the app itself); None: the start was interrupted.
    :ivar init: first process of the agent's pid namespace, None without one; :ivar pidns: its inode.
    :ivar token: random, in the environment of every process of the run.
    :ivar helper: the process that carries the network, None without one.
    :ivar pipe: inode of the pipe that its output goes to.
    :ivar status: path of the file that bubblewrap writes.
    :ivar asked: the manager was asked to end it; :ivar ended: why it ended by itself, None while not settled.
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
    asked: bool = False
    ended: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What bubblewrap wrote: pid of the init, inode of its pid namespace, exit code; 0 or None while unknown."""

    child: int = 0
    pidns: int = 0
    exit_code: int | None = None


def parse(text: bytes) -> Record | None:
    """Return what a journal says; None when not even its first line is whole (a start that never began)."""
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


def told(record: Record) -> Told:
    """Return what bubblewrap wrote of a run."""
    try:
        documents = _documents(Path(record.status).read_bytes())
    except OSError:
        return Told()
    known: dict[str, Any] = {}
    for document in documents:
        known |= document
    return Told(
        child=known.get("child-pid", 0), pidns=known.get("pid-namespace", 0), exit_code=known.get("exit-code")
    )


def _documents(text: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, up to one that was being written when somebody was killed."""
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
            raise _unwritable(self.directory, error) from error

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
            raise _unavailable(self.directory, error) from error

    def read(self, name: str) -> Record | None:
        """Return an agent's record, None when there is none.

        :raises Unavailable: it cannot be read.
        """
        try:
            return parse(self.path(name).read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unavailable(self.path(name), error) from error

    def status_path(self, name: str) -> Path:
        """Return the file that bubblewrap writes."""
        return self.directory / f"{name}.status"

    def asleep_path(self, name: str) -> Path:
        """Return the file that says which processes were stopped already when the agent was put to sleep."""
        return self.directory / f"{name}.asleep"

    def begin(self, record: dict[str, Any]) -> int:
        """Begin a new journal in the place of an old one; return the descriptor of the new status file.

        :raises ProviderError: they cannot be written.
        """
        path, status = self.path(record["name"]), self.status_path(record["name"])
        fresh = path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            for old in (fresh, status):
                with contextlib.suppress(FileNotFoundError):
                    old.unlink()
            fd = os.open(fresh, flags, 0o600)
            try:
                _append(fd, {"version": VERSION, "status": str(status)} | record)
            finally:
                os.close(fd)
            fd = os.open(status, flags, 0o600)
            try:
                fresh.rename(path)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise _unwritable(path, error) from error
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
            raise _unwritable(path, error) from error
        try:
            _append(fd, document)
        except OSError as error:
            raise _unwritable(path, error) from error
        finally:
            os.close(fd)

    def remove(self, name: str) -> None:
        """Remove a journal; absent is success."""
        for path in (self.path(name), self.status_path(name), self.asleep_path(name)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def lock(self, name: str) -> threading.RLock:
        """Return the lock of an agent, shared by all instances of this process (one manager owns it all)."""
        with _LOCKS_LOCK:
            return _LOCKS.setdefault(str(self.path(name)), threading.RLock())

    @contextlib.contextmanager
    def locked(self, name: str, deadline: Deadline) -> Iterator[None]:
        """Hold an agent alone.

        :raises DeadlineExceeded: somebody else holds it for too long, or no time is left.
        """
        lock = self.lock(name)
        if deadline.expired:
            raise DeadlineExceeded(f"No time is left for {name}", fix="try again")
        if not lock.acquire(timeout=deadline.remaining()):
            raise DeadlineExceeded(f"Somebody else is at work on {name}", fix="try again")
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def try_locked(self, name: str, seconds: float = 0.0) -> Iterator[bool]:
        """Hold an agent alone if it is free or becomes so within some time; yields whether."""
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


def _unwritable(path: Path, error: OSError) -> ProviderError:
    return ProviderError(
        f"Cannot write {path}", why=error.strerror or str(error), fix="make room, or mend the state directory"
    )


def _unavailable(path: Path, error: OSError) -> Unavailable:
    return Unavailable(f"Cannot read {path}", why=error.strerror or str(error), fix="mend the state directory")
