"""Asks the directories for the groups of known users, and for users who have left.

A user who has left is signed out and the agents stop; the data is kept for ``auth.keep_departed``.  If most users
of a directory seem to have left, it is more likely that something is wrong, and nobody is signed out.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from dispatcher.common.log import logger
from dispatcher.manager.agents.composition import Supervisor
from dispatcher.manager.auth import local
from dispatcher.manager.auth.authenticators import Authenticators, is_same_account
from dispatcher.manager.auth.contained_authenticator import ContainedAuthenticator
from dispatcher.manager.storage.rows import UserRow
from dispatcher.plugin.authenticator import Identity
from dispatcher.plugin.deadline import Deadline, SteadyWallClock
from dispatcher.plugin.errors import Conflict, DispatcherError, NotFound, Unsupported

SECONDS = 20.0  # for one user
AT_ONCE = 8  # users
MAX_FAILURES = 5  # of one directory in a row; then it is not asked for the others
FEW = 5  # users who may leave at once, whatever their share
SHARE = 0.5  # of a directory's users; if more have left, it is rather wrong
DAY = 86400.0  # seconds
STEPS = 10  # runs at least, from a departure to the end of the data

_log = logger("manager.sync")


@dataclass(slots=True)
class Report:
    """What a synchronisation found.

    :ivar users: number of users to look up; :ivar asked: number of them that were looked up.
    :ivar changed: users whose groups changed; :ivar left: who have left; :ivar back: who have an account again.
    :ivar removed: users whose data was deleted, as they left long ago.
    :ivar skipped: users by the authenticator that cannot be asked; :ivar problems: what went wrong, in sentences.
    """

    running: bool = True
    dry_run: bool = False
    users: int = 0
    asked: int = 0
    changed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    back: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class DirectorySync:
    """Synchronises users with their directories, one run at a time.

    :param interval: returns the seconds between runs, False for none.
    :param keep: returns the seconds until the data of a departed user is deleted, False: never.
    :param sign_out: ends all that gives a user access: sessions and tokens.
    """

    def __init__(
        self,
        *,
        authenticators: Authenticators,
        supervisor: Supervisor,
        clock: SteadyWallClock,
        interval: Callable[[], float | Literal[False]],
        keep: Callable[[], float | Literal[False]],
        sign_out: Callable[[str], object],
    ) -> None:
        self._authenticators = authenticators
        self._supervisor = supervisor
        self._clock = clock
        self._interval = interval
        self._keep = keep
        self._sign_out = sign_out
        self._running = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.report: Report | None = None

    def start(self) -> None:
        """Begin to run regularly."""
        self._thread = threading.Thread(target=self._run, name="dispatcher-sync", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; a run in progress ends after the present users."""
        self._closing.set()
        if self._thread:
            self._thread.join(3)

    def begin(self, *, force: bool = False, dry_run: bool = False) -> Report:
        """Begin a run; return its report, which fills.

        :param force: most users of a directory may have left; :param dry_run: change nothing.
        :raises Conflict: another one is in progress.
        """
        if not self._running.acquire(blocking=False):
            raise Conflict("A synchronisation is in progress", fix="run `dispatcher sync` again when it has ended")
        report = self.report = Report(dry_run=dry_run)

        def run() -> None:
            try:
                self._synchronise(report, force=force)
            except Exception as error:
                _log.exception("a synchronisation failed")
                report.problems.append(f"{type(error).__name__}: {error}")
            finally:
                report.running = False
                self._running.release()

        threading.Thread(target=run, name="dispatcher-sync-run", daemon=True).start()
        return report

    def _run(self) -> None:
        last = self._clock.now()
        while not self._closing.wait(1.0):
            interval = self._interval()
            if interval and self._clock.now() - last >= interval and self._authenticators.external:
                last = self._clock.now()
                try:
                    self.begin()
                except Conflict:
                    continue

    def _synchronise(self, report: Report, *, force: bool) -> None:
        if not report.dry_run:
            self._supervisor.store.count_departed(self._clock.now(), max(DAY, self._keep() / STEPS))
        rows = [row for row in self._supervisor.store.users() if row.source not in {None, local.NAME}]
        rows.sort(key=lambda row: row.source or "")
        groups = [(source or "", list(each)) for source, each in groupby(rows, key=lambda row: row.source)]
        report.users = len(rows)
        for source, users in groups:
            try:
                entry = self._authenticators.get(source)
            except NotFound:
                report.skipped[source] += len(users)
                continue
            found = dict(self._ask(entry, users, report))
            if self._apply(entry.name, users, found, report, force=force):
                gone = [row for row in users if row.name in found and not _is_same(row, found[row.name])]
                self._remove(gone, report)
        shown = {name: len(getattr(report, name)) for name in ("changed", "left", "back", "removed")}
        if any(shown.values()) or report.problems:
            _log.info("users are synchronised", users=report.users, **shown, problems=report.problems)

    def _ask(
        self, entry: ContainedAuthenticator, users: list[UserRow], report: Report
    ) -> Iterator[tuple[str, Identity | None]]:
        """Yield what a directory says of users; users without an answer are left out."""
        failures = 0

        def ask(row: UserRow) -> tuple[UserRow, Identity | DispatcherError | None]:
            if self._closing.is_set() or failures >= MAX_FAILURES:
                return row, NotFound("it was not asked")
            try:
                return row, entry.lookup(row.name, deadline=Deadline(SECONDS))
            except DispatcherError as error:
                return row, error

        with ThreadPoolExecutor(AT_ONCE, "dispatcher-sync-ask") as pool:
            for row, answer in pool.map(ask, users):
                report.asked += 1
                if isinstance(answer, Unsupported):
                    failures = MAX_FAILURES
                    report.skipped[entry.name] = len(users)
                elif isinstance(answer, DispatcherError):
                    failures += 1
                    if failures == 1:
                        report.problems.append(f"{entry.name}: {answer}")
                else:
                    failures = 0
                    yield row.name, answer

    def _apply(
        self,
        source: str,
        users: list[UserRow],
        found: dict[str, Identity | None],
        report: Report,
        *,
        force: bool,
    ) -> bool:
        """Apply what a directory says; return whether it is trusted that users have left."""
        present = [row for row in users if row.departed is None and row.name in found]
        gone = [row for row in present if not _is_same(row, found[row.name])]
        trusted = force or not _too_many(gone, present)
        if not trusted:
            report.problems.append(
                f"{source}: {len(gone)} of {len(present)} users seem to have left, so none was signed out "
                "(if they have really left: dispatcher sync --force)"
            )
            gone = []
        for row in gone:
            report.left.append(row.name)
            if not report.dry_run and self._is_unchanged(row):
                self._depart(row.name)
        for row in users:
            identity = found.get(row.name)
            if identity is None or not _is_same(row, identity):
                continue
            groups = tuple(sorted(identity.groups))
            if row.departed is not None:
                report.back.append(row.name)
            elif groups != row.groups:
                report.changed.append(row.name)
            else:
                continue
            if report.dry_run or not self._is_unchanged(row):
                continue
            if self._supervisor.store.bind_user(row.name, source, identity.subject, groups):
                self._supervisor.access.set_groups(row.name, groups)
        return trusted

    def _is_unchanged(self, row: UserRow) -> bool:
        """Whether nobody has signed in with the name, released or removed it since the directory was asked."""
        return self._supervisor.store.get_user(row.name) == row

    def _depart(self, user: str) -> None:
        """Sign a user out who has left, and stop the agents."""
        _log.warning("a user has left the directory", user=user)
        self._supervisor.store.set_departed(user, self._clock.now())
        self._supervisor.access.set_groups(user, ())
        self._sign_out(user)
        self._supervisor.access.stop_all(user, "its user has left the directory")

    def _remove(self, gone: list[UserRow], report: Report) -> None:
        """Delete the agents and data of users who left long ago.

        :param gone: users without an account in this run.
        """
        keep, now = self._keep(), self._clock.now()
        names = {row.name for row in gone if row.departed is not None}
        for row in self._supervisor.store.users() if names and keep is not False else ():
            if row.name not in names or row.departed is None or now - row.departed < keep:
                continue
            report.removed.append(row.name)
            if report.dry_run:
                continue
            _log.warning("the data of a user is deleted", user=row.name, seconds=round(now - row.departed))
            for view in self._supervisor.queries.views(user=row.name):
                try:
                    self._supervisor.commands.remove(view.name, keep_data=False)
                except DispatcherError as error:
                    report.problems.append(f"{view.name} cannot be removed: {error}")


def _too_many(gone: Collection[UserRow], asked: Collection[UserRow]) -> bool:
    """Whether it is more likely that something is wrong than that these users have left."""
    return len(gone) > max(FEW, SHARE * len(asked)) or (len(gone) == len(asked) > 1)


def _is_same(row: UserRow, identity: Identity | None) -> bool:
    """Whether the directory has the account of a user."""
    return identity is not None and is_same_account(row, identity)
