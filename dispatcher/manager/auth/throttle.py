"""Throttling of password guessing.  No I/O and no clock: times are passed in; `storage.auth` stores the accounts.

Wrong passwords are counted for a name (whether it exists or not) and for an address (an IPv6 address by its
/64).  After a few free ones the delay doubles with each further one.  Then one attempt is admitted at a time,
charged before the password is checked: a burst gains nothing, and a class of thirty that signs in at once with
the right passwords is never delayed.

A browser that has signed in before proves it with its device token: then only the account of that device and name
counts, so that an attacker cannot lock the user out.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from dispatcher.common.humanize import duration
from dispatcher.manager.storage.auth import Account, Changes
from dispatcher.plugin.errors import TooManyRequests

FORGET = 24 * 3600.0  # seconds without attempts after which an account is forgotten
MAX_ACCOUNTS = 10_000


@dataclass(frozen=True, slots=True)
class Rule:
    """When an account is delayed, and how much.

    :ivar free: wrong passwords without a delay; :ivar first: delay after the next one, doubled by each further
        one; :ivar most: longest delay; :ivar forgive: one wrong password is forgiven each so many seconds.
    """

    free: int
    first: float
    most: float
    forgive: float

    def delay(self, failures: float) -> float:
        """Return the delay in seconds after so many wrong passwords."""
        over = failures - self.free
        return 0.0 if over < 0 else min(self.most, self.first * 2.0 ** min(over, 60.0))


#: Per name: five attempts, then 1, 2, 4, ... seconds, at most 15 minutes.
NAME = Rule(free=5, first=1.0, most=900.0, forgive=1800.0)
#: Per address: more and shorter, as many people may share one.
ADDRESS = Rule(free=20, first=1.0, most=60.0, forgive=120.0)
RULES = {"name": NAME, "address": ADDRESS, "device": NAME}


def address_key(address: str) -> str:
    """Return the key of an address; all invalid addresses have the same one."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "address:other"
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is None:
            return f"address:{ipaddress.ip_network((found, 64), strict=False)}"
        found = found.ipv4_mapped
    return f"address:{found}"


class Throttle:
    """The accounts of all names, addresses and devices; bounded.

    :param accounts: as stored.
    """

    def __init__(self, accounts: Mapping[str, Account] | None = None, *, limit: int = MAX_ACCOUNTS) -> None:
        self._accounts = dict(accounts or {})
        self._limit = limit
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._accounts)

    def admit(self, keys: Iterable[str], now: float) -> Changes:
        """Admit one attempt, for all `keys` or none; return the changed accounts, to be stored.

        :param keys: ``name:...``, ``address:...``, ``device:...``.
        :raises TooManyRequests: one of them must wait; `retry_after` says how long.
        """
        changed: Changes = {}
        with self._lock:
            known = {key: self._accounts[key] for key in keys if key in self._accounts}
            wait = max((account.until - now for account in known.values()), default=0.0)
            if wait > 0:
                raise TooManyRequests(
                    "Too many attempts to sign in",
                    why="passwords were wrong several times for this name or from this address",
                    fix=f"wait {duration(wait, up=True)}, then try again",
                    retry_after=wait,
                )
            for key, account in known.items():
                delay = _rule(key).delay(self._forgiven(key, now) + 1)
                if delay:
                    changed[key] = self._accounts[key] = replace(account, until=now + delay)
        return changed

    def failed(self, keys: Iterable[str], now: float) -> Changes:
        """Count a wrong password for all `keys`; return the changed accounts, to be stored."""
        changed: Changes = {}
        with self._lock:
            for key in keys:
                failures = self._forgiven(key, now) + 1
                changed[key] = self._accounts[key] = Account(failures, now, now + _rule(key).delay(failures))
            if len(self._accounts) > self._limit:
                changed.update(self._evict(set(changed), now))
        return changed

    def succeeded(self, keys: Iterable[str], now: float, *, forget: Iterable[str] = ()) -> Changes:
        """End the delay of `keys`: the password was right, or not checked.  Delete the accounts `forget`."""
        changed: Changes = {}
        with self._lock:
            for key in forget:
                if self._accounts.pop(key, None):
                    changed[key] = None
            for key in keys:
                account = self._accounts.get(key)
                if account is not None and account.until > now:
                    changed[key] = self._accounts[key] = replace(account, until=now)
        return changed

    def _forgiven(self, key: str, now: float) -> float:
        """Return the number of wrong passwords that still count."""
        account = self._accounts.get(key)
        if account is None or now - account.last > FORGET:
            return 0.0
        return max(0.0, account.failures - max(0.0, now - account.last) / _rule(key).forgive)

    def _evict(self, spare: set[str], now: float) -> Changes:
        """Drop a tenth: expired accounts, then those with the fewest failures, the oldest first."""

        def worth(key: str) -> tuple[bool, float, float]:
            account = self._accounts[key]
            return now - account.last < FORGET, account.failures, account.last

        ranked = sorted((key for key in self._accounts if key not in spare), key=worth)
        dropped = ranked[: max(1, self._limit // 10)]
        for key in dropped:
            del self._accounts[key]
        return dict.fromkeys(dropped)


def _rule(key: str) -> Rule:
    return RULES[key.partition(":")[0]]
