"""Passwords: argon2id, and the bounded pool in which they are checked.

Parameters are RFC 9106's second choice reduced as OWASP advises for servers: 46 MiB, one pass, one lane, about
35 ms.  More than 32 MiB on purpose: above that the C library maps the memory of each check separately and
returns it at once, so that password checks do not enlarge the manager permanently.
"""

from __future__ import annotations

import secrets
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from functools import cached_property
from typing import TypeVar

from dispatcher.manager.auth.contained_authenticator import unavailable
from dispatcher.manager.backends.pool import Pool
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import BadRequest, DeadlineExceeded, DispatcherError, TooManyRequests

MIN_LENGTH = 8  # characters
MAX_LENGTH = 1024
MEMORY_KIB = 46 * 1024
PASSES = 1

_T = TypeVar("_T")


def check_length(password: str) -> None:
    """Refuse a new password that is too short or too long.

    :raises BadRequest: with the allowed lengths, never the password.
    """
    length = len(_prepared(password))
    if not MIN_LENGTH <= length <= MAX_LENGTH:
        raise BadRequest(
            "The password cannot be used",
            why=f"it has {length} characters, allowed are {MIN_LENGTH} to {MAX_LENGTH}",
            fix="choose another password",
        )


class Hasher:
    """Makes and verifies argon2id hashes.

    :param memory: KiB; :param passes: over that memory.
    """

    def __init__(self, memory: int = MEMORY_KIB, passes: int = PASSES) -> None:
        import argon2

        self._argon2 = argon2
        self._hasher = argon2.PasswordHasher(time_cost=passes, memory_cost=memory, parallelism=1)

    def hash(self, password: str) -> str:
        """Return the hash, which contains its salt and the parameters."""
        return str(self._hasher.hash(_encoded(password)))

    def verify(self, stored: str | None, password: str) -> bool:
        """Whether the password belongs to a hash.  Without a hash: False, after the same time."""
        try:
            self._hasher.verify(self._dummy if stored is None else stored, _encoded(password))
        except (self._argon2.exceptions.VerificationError, self._argon2.exceptions.InvalidHashError):
            return False
        return stored is not None

    def outdated(self, stored: str) -> bool:
        """Whether a hash has other parameters than the present ones."""
        return bool(self._hasher.check_needs_rehash(stored))

    def warm(self) -> None:
        """Make the hash for unknown names, so that the first one takes no longer than the next."""
        _ = self._dummy

    @cached_property
    def _dummy(self) -> str:
        """A hash that no password matches."""
        return self.hash(secrets.token_hex())


def _prepared(password: str) -> str:
    """Return the form that is hashed: one for each way to type it (RFC 8265, section 4.2.2, OpaqueString).

    Keyboards and systems differ in whether an accent is a character of its own, and in which blank they send.
    """
    if password.isascii() or len(password) > MAX_LENGTH:  # normalisation can take the square of the length
        return password
    blanks = (" " if unicodedata.category(each) == "Zs" else each for each in password)
    return unicodedata.normalize("NFC", "".join(blanks))


def _encoded(password: str) -> bytes:
    """Return a password as bytes, half of a surrogate pair included."""
    return _prepared(password).encode(errors="surrogatepass")


class HashPool:
    """Runs password checks, with a bounded queue that no single source can fill.

    Of all places one address may take half, and one name or device a quarter.  An eighth is for known devices.  A
    check that hangs past its deadline is given up, and has no place any more.

    :param workers: checks at the same time; :param queue: checks that may wait.
    :param at_once: run the latter, too: they wait for a directory rather than use a processor.
    :ivar present: checks that run or wait.
    """

    def __init__(self, workers: int, queue: int, *, at_once: bool = False) -> None:
        self._pool = Pool("dispatcher-hash", workers + queue if at_once else workers)
        self._lock = threading.Lock()
        self._size = workers + queue
        self.present = 0
        self._taken: Counter[str] = Counter()  # places, by source

    def run(
        self,
        work: Callable[[], _T],
        deadline: Deadline,
        sources: Collection[str] = (),
        overdue: Callable[[DispatcherError], None] = lambda _error: None,
    ) -> _T:
        """Return what `work` returns, run in the pool.

        :param sources: what asks for it: ``address:...``, ``name:...``, ``device:...``.
        :param overdue: called when it is given up.
        :raises TooManyRequests: the queue is full, or one of the sources has taken its share.
        :raises DeadlineExceeded: it waited too long, and is not run.
        :raises Unavailable: it did not finish in time; its place stays taken until it does.
        """
        with self._lock:
            stranger = bool(sources) and not any(key.startswith("device:") for key in sources)
            size = self._size - self._size // 8 if stranger else self._size
            if self.present >= size or any(self._taken[key] >= self._share(key) for key in sources):
                raise TooManyRequests(
                    "Too many sign-ins at once",
                    why=f"{self.present} passwords are being checked or wait",
                    fix="try again in a moment",
                    retry_after=2,
                )
            self.present += 1
            self._taken.update(sources)
        future: Future[_T] = Future()
        future.add_done_callback(lambda _: self._left(sources))

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                _finish(future, result=work())
            except BaseException as error:
                _finish(future, error=error)

        def give_up(error: DispatcherError) -> None:
            _finish(future, error=unavailable())
            overdue(error)

        self._pool.submit(run, overdue=give_up)
        try:
            return future.result(deadline.remaining())
        except FutureTimeout as error:
            if future.cancel():
                fix = "try again in a moment"
                raise DeadlineExceeded("The password was not checked in time", fix=fix) from error
            if future.done():  # just now, or the error is its own
                return future.result()
            raise unavailable() from error

    def background(self, work: Callable[[], object]) -> None:
        """Run `work` in the pool, without waiting for it."""

        def run() -> None:
            work()

        self._pool.submit(run)

    def check_overdue(self) -> None:
        """Give up checks that hang; called regularly."""
        self._pool.check_overdue()

    def close(self) -> None:
        """Finish running checks, drop waiting ones."""
        self._pool.close()

    def _share(self, source: str) -> int:
        return max(2, self._size // (2 if source.startswith("address:") else 4))

    def _left(self, sources: Collection[str]) -> None:
        with self._lock:
            self.present -= 1
            self._taken -= Counter(sources)  # drops what is zero


def _finish(future: Future[_T], *, result: _T | None = None, error: BaseException | None = None) -> None:
    """Finish a future, unless that has happened: a check that was given up may still return."""
    with suppress(InvalidStateError):
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]
