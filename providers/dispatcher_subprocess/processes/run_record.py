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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dispatcher.plugin import Deadline, DeadlineExceeded, Process
from dispatcher_subprocess.errors import failed, unreadable

VERSION = 1
SUFFIX = ".agent"
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
_NEW = _FLAGS | os.O_CREAT | os.O_EXCL
_LOCKS: dict[str, threading.RLock] = {}
_LOCKS_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One agent's latest run.

    :ivar main: what the manager started (the outer bwrap, or the app itself); None: the start was interrupted.
    :ivar init: first process of the agent's pid namespace, None without one.
    :ivar token: random, in the environment of every process of the run.
    :ivar helper: the process that carries the network, None without one.
    :ivar pipe: inode of the pipe that its output goes to.
    :ivar status: path of the file that bubblewrap writes.
    :ivar unseen: a file that its command names and its sandbox does not show, or "".
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
    sandboxed: bool
    status: str
    pipe: int
    started_at: float | None = None
    main: Process | None = None
    init: Process | None = None
    helper: Process | None = None
    unseen: str = ""
    stop_requested: bool = False
    ended: str | None = None

    def fields(self) -> dict[str, Any]:
        """Return the content of its line in the journal."""
        return {name: getattr(self, name) for name in self.__slots__}

    def sandbox_status(self) -> dict[str, int]:
        """Return what bubblewrap wrote: ``child-pid`` (the init), ``pid-namespace``, at the end ``exit-code``."""
        try:
            return _merged(Path(self.status).read_bytes())
        except OSError:
            return {}


def parse(text: bytes) -> Record | None:
    """Parse a journal; None if its first line is incomplete (the start never began)."""
    known = _merged(text)
    if known.pop("version", None) != VERSION:
        return None
    for key in ("main", "init", "helper"):
        if known.get(key):
            known[key] = Process(**known[key])
    return Record(**known)


def _merged(text: bytes) -> dict[str, Any]:
    """Merge the JSON objects of a file, up to one that is incomplete because its writer was killed."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        try:
            found |= json.loads(line)
        except (ValueError, TypeError):
            break
    return found


class Journals:
    """All journals of an installation, in one private directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        """Return the journal of a backend name; such a name is legal as a file name."""
        return self.directory / f"{name}{SUFFIX}"

    def suspended_path(self, name: str) -> Path:
        """Return the file that lists the processes which were stopped before the agent was suspended."""
        return self.directory / f"{name}.suspended"

    def prepare(self) -> None:
        """Make the directory.

        :raises ProviderError: it cannot be made.
        """
        with self._writing(self.directory):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

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
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return iter(())
        except OSError as error:
            raise unreadable(self.directory, error) from error
        return filter(None, (self.read(name.removesuffix(SUFFIX)) for name in names if name.endswith(SUFFIX)))

    def status_path(self, name: str) -> Path:
        """Return the file that bubblewrap writes."""
        return self.directory / f"{name}.status"

    def begin(self, record: Record) -> int:
        """Begin a new journal in the place of an old one; return the descriptor of the new status file.

        :raises ProviderError: they cannot be written.
        """
        path, status = self.path(record.name), self.status_path(record.name)
        new = path.with_suffix(".new")
        with self._writing(path), contextlib.ExitStack() as undo:
            for old in (new, status, self.suspended_path(record.name)):
                old.unlink(missing_ok=True)
            _append(os.open(new, _NEW, 0o600), {"version": VERSION} | record.fields())
            fd = os.open(status, _NEW, 0o600)
            undo.callback(os.close, fd)
            new.rename(path)
            undo.pop_all()
        return fd

    def append(self, name: str, document: dict[str, Any]) -> None:
        """Add to an agent's journal, if it has one.

        :raises ProviderError: it cannot be written.
        """
        path = self.path(name)
        with self._writing(path), contextlib.suppress(FileNotFoundError):
            _append(os.open(path, _FLAGS), document)

    def remove(self, name: str) -> None:
        """Remove a journal; absent is success."""
        for file in (self.path(name), self.status_path(name), self.suspended_path(name)):
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self, name: str, deadline: Deadline) -> Iterator[None]:
        """Hold an agent's lock.

        :raises DeadlineExceeded: another operation holds it, or no time is left.
        """
        with self.try_locked(name, deadline.remaining()) as held:
            if not held or deadline.expired:
                raise DeadlineExceeded(f"Another operation on {name} is under way", fix="try again")
            yield

    @contextlib.contextmanager
    def try_locked(self, name: str, seconds: float = 0.0) -> Iterator[bool]:
        """Take an agent's lock within some seconds; yield whether it is held.

        All instances in this process share the locks.
        """
        with _LOCKS_LOCK:
            lock = _LOCKS.setdefault(str(self.path(name)), threading.RLock())
        held = lock.acquire(timeout=seconds)
        try:
            yield held
        finally:
            if held:
                lock.release()

    @staticmethod
    @contextlib.contextmanager
    def _writing(path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise failed(f"Cannot write {path}", error, fix="repair the state directory") from error


def _append(fd: int, document: dict[str, Any]) -> None:
    """Write a line to a descriptor, and close it."""
    try:
        line = json.dumps(document, default=asdict).encode() + b"\n"
        if os.write(fd, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(fd)
