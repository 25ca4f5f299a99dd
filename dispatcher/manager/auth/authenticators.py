"""The authenticators of the configuration in their order, and which of them a user is asked of.

A name belongs to the authenticator that signed its user in first: the password of a known user is sent to that one
only, and nobody gets another person's agents by an account of the same name elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dispatcher.manager.auth import local
from dispatcher.manager.auth.contained_authenticator import ContainedAuthenticator
from dispatcher.manager.storage.rows import UserRow
from dispatcher.plugin.authenticator import Identity
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError, NotFound


class Authenticators:
    """One or more authenticators.

    :param entries: in the order of ``auth.authenticator``.
    """

    def __init__(self, entries: Sequence[ContainedAuthenticator]) -> None:
        self._entries = {entry.name: entry for entry in entries}

    def __iter__(self) -> Iterator[ContainedAuthenticator]:
        return iter(self._entries.values())

    @property
    def local(self) -> ContainedAuthenticator | None:
        """The authenticator whose passwords the manager stores, if it is configured."""
        return self._entries.get(local.NAME)

    @property
    def external(self) -> bool:
        """Whether a user can be known to another authenticator than `local`."""
        return bool(self._entries.keys() - {local.NAME})

    @property
    def several(self) -> bool:
        """Whether the time of a refusal could show to which authenticator a name belongs."""
        return len(self._entries) > 1

    @property
    def refusal_time(self) -> float:
        """Seconds that the refusal of a new name takes at least, as each of them but `local` is asked."""
        return sum(entry.refusal_time for entry in self.of(None))

    def get(self, name: str) -> ContainedAuthenticator:
        """Return the authenticator of an entry.

        :raises NotFound: none is configured under that name.
        """
        if name not in self._entries:
            raise NotFound(f"There is no authenticator {name}", fix="see auth.authenticator")
        return self._entries[name]

    def of(self, user: UserRow | None) -> list[ContainedAuthenticator]:
        """Return those that may know a user: the one to which the name belongs, else all but `local`."""
        source = source_of(user)
        if source in self._entries:
            return [self._entries[source]]
        others = [entry for name, entry in self._entries.items() if name != local.NAME]
        return others or list(self)  # `local` alone refuses unknown names in the same time as wrong passwords

    def authenticate(
        self,
        user: UserRow | None,
        name: str,
        password: str,
        deadline: Deadline,
        asking: Callable[[ContainedAuthenticator], object],
    ) -> tuple[str, Identity] | None:
        """Return the authenticator that accepts a password and the user, None if each refuses it.

        :param asking: called before an authenticator is asked.
        :raises Unavailable: none accepts it, and one cannot say.
        """
        asked = self.of(user)
        if self.local and not any(entry.verifies_passwords for entry in asked):
            asked, name = [self.local], ""  # nobody's: it refuses that after the time of a wrong password
        return ask_for_password(asked, name, password, deadline, asking)

    def problems(self) -> Iterator[tuple[ContainedAuthenticator, DispatcherError]]:
        """Yield the authenticators that do not work, each with the reason, as far as the last calls show."""
        yield from ((entry, entry.problem) for entry in self if entry.problem is not None)


def ask_for_password(
    entries: Sequence[ContainedAuthenticator],
    name: str,
    password: str,
    deadline: Deadline,
    asking: Callable[[ContainedAuthenticator], object] = lambda _entry: None,
) -> tuple[str, Identity] | None:
    """Ask authenticators in turn; the parameters, the result and the errors are those of `authenticate`."""
    failed: DispatcherError | None = None
    asked = [entry for entry in entries if entry.verifies_passwords]
    for place, entry in enumerate(asked):
        asking(entry)
        allowed = deadline.bounded(deadline.remaining() / (len(asked) - place))
        try:
            identity = entry.authenticate(name, password, deadline=allowed)
        except DispatcherError as error:
            failed = failed or error
            continue
        if identity is not None:
            return entry.name, identity
    if failed is not None:
        raise failed
    return None


def source_of(user: UserRow | None) -> str | None:
    """Return the authenticator to which a user's name belongs; None before an external one has signed it in."""
    if user is None:
        return None
    return user.source or (local.NAME if user.password_hash is not None else None)


def is_same_account(row: UserRow, identity: Identity) -> bool:
    """Whether what a user's authenticator says under the user's name is about the user's account."""
    subjects = {row.subject, identity.subject} - {None}
    return identity.user == row.name and len(subjects) < 2
