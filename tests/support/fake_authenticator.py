"""The reference authenticator of the kit: a directory in memory that can be down or silent."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import threading
from typing import ClassVar

from dispatcher.plugin import Authenticator, Deadline, DeadlineExceeded, Identity, Table, Unavailable

ROUNDS = 300  # well below a millisecond
_SALT = b"fake"


class FakeOptions(Table):
    """[auth.fake]"""

    directory: str = "default"
    tries: int = 3


class FakeDirectory:
    """People with the hashes of their passwords, and who may sign in."""

    _all: ClassVar[dict[str, FakeDirectory]] = {}

    def __init__(self) -> None:
        self.hashes: dict[str, bytes] = {}
        self.locked: set[str] = set()
        self.state = "up"
        self.changed = threading.Condition()

    @classmethod
    def named(cls, name: str) -> FakeDirectory:
        return cls._all.setdefault(name, cls())

    def add(self, name: str, password: str, *, locked: bool = False) -> None:
        self.hashes[name] = hashed(password)
        if locked:
            self.locked.add(name)

    @contextlib.contextmanager
    def outage(self, how: str):
        self._become(how)
        try:
            yield
        finally:
            self._become("up")

    def _become(self, state: str) -> None:
        with self.changed:
            self.state = state
            self.changed.notify_all()

    def search(self, name: str, deadline: Deadline) -> bytes | None:
        """Return the hash of somebody who may sign in, as a server would that answers, or does not."""
        with self.changed:
            while self.state == "silent":
                if deadline.expired:
                    raise DeadlineExceeded("The directory does not answer", fix="check the directory")
                self.changed.wait(deadline.remaining())
            if self.state == "down":
                raise Unavailable("The directory is away", why="connection refused", fix="start the directory")
        return None if name in self.locked else self.hashes.get(name)


def hashed(password: str) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", password.encode(errors="surrogatepass"), _SALT, ROUNDS)


_NOBODY = hashed("nobody has it")


class FakeAuthenticator(Authenticator):
    name = "fake-directory"
    api_version = 1
    Options = FakeOptions

    @property
    def directory(self) -> FakeDirectory:
        return FakeDirectory.named(self.options.directory)

    def authenticate(self, name: str, password: str, *, deadline: Deadline) -> Identity | None:
        stored = self.directory.search(name, deadline)
        right = hmac.compare_digest(stored or _NOBODY, hashed(password))
        return self.identity(name) if right and stored else None

    def identity(self, name: str) -> Identity:
        return Identity(user=name, groups=frozenset({"people"}), subject=f"id of {name}")

    def lookup(self, name: str, *, deadline: Deadline) -> Identity | None:
        return self.identity(name) if self.directory.search(name, deadline) else None
