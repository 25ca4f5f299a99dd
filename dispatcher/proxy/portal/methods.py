"""The ways to sign in, from the manager; cached for some seconds, so that strangers cannot keep it busy."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dispatcher.plugin.deadline import boottime
from dispatcher.plugin.errors import DispatcherError, NotFound

if TYPE_CHECKING:
    from dispatcher.client.manager_client import ManagerClient

FRESH = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class Site:
    """Another site at which users sign in.  `name` is the authenticator's."""

    name: str
    title: str


@dataclass(frozen=True, slots=True)
class SignInMethods:
    """The ways to sign in."""

    passwords: bool = True
    sites: tuple[Site, ...] = ()

    @property
    def only(self) -> Site | None:
        """The site, if there is no other way."""
        return self.sites[0] if len(self.sites) == 1 and not self.passwords else None


class Methods:
    """The ways to sign in, read when they are needed."""

    def __init__(self) -> None:
        self._known = SignInMethods()
        self._until = 0.0
        self._lock = threading.Lock()

    def get(self, client: ManagerClient) -> SignInMethods:
        """Return them; while the manager does not answer, the last ones."""
        with self._lock:
            due = boottime() >= self._until
            if due:  # one thread asks
                self._until = boottime() + FRESH
        if due:
            try:
                found = client.sign_in_methods()
                sites = tuple(Site(str(site["name"]), str(site["title"])) for site in found["sites"])
                self._known = SignInMethods(bool(found["passwords"]), sites)
            except NotFound:  # of an earlier manager
                self._known = SignInMethods()
            except DispatcherError:
                self._until = 0.0
        return self._known
