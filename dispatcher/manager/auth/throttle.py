"""Throttling of password guessing.  No I/O and no clock: times are passed in; `storage.auth` stores the accounts.

Wrong passwords are counted for a name (whether it exists or not) and for an address (an IPv6 address by its
/64).  After a few free ones each further one costs a longer delay, and then one attempt is checked at a time.
An attempt is admitted when its check begins, and counts as a wrong one until it ends: a burst gains nothing.

Many people may share an address: it has more free attempts for each name that has signed in from it, a right
password gives back what the same name's wrong ones have cost, and a class that signs in at once is never delayed.

A browser that has signed in before proves it with its device token: then only the account of that device and name
counts, so that an attacker cannot lock the user out.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from dispatcher.common.humanize import duration
from dispatcher.manager.storage.auth import Account, Changes
from dispatcher.plugin.errors import TooManyRequests

FORGET = 24 * 3600.0  # seconds without attempts after which an account is forgotten
MAX_ACCOUNTS = 10_000


@dataclass(frozen=True, slots=True)
class Rule:
    """When an account is delayed, and how much.

    :ivar free: wrong passwords without a delay; :ivar step: those that double it, from 1 second on.
    :ivar most: longest delay; :ivar forgive: one wrong password is forgiven each so many seconds.
    """

    free: int
    step: float
    most: float
    forgive: float

    def delay(self, failures: float) -> float:
        """Return the delay in seconds after so many wrong passwords."""
        over = round(failures) - self.free  # between two guesses a part of the first was forgiven
        return 0.0 if over < 0 else min(self.most, 2.0 ** min(over / self.step, 60.0))


#: Per name: five attempts, then 1, 2, 4, ... seconds, at most 15 minutes.
NAME = Rule(free=5, step=1, most=900.0, forgive=1800.0)
#: Per address: more and shorter.
ADDRESS = Rule(free=50, step=10, most=60.0, forgive=120.0)
MAX_NAMES = 1000  # that add to the free attempts of one address


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


class Throttled(TooManyRequests):
    """An attempt must wait; `retry_after` says how long."""


class Throttle:
    """The accounts of all names, addresses and devices; bounded.

    Each attempt that was admitted ends with `failed`, `succeeded` or `released`.  Keys are ``name:...``,
    ``address:...`` and ``device:...``.  Changed accounts are returned, to be stored.

    :param accounts: as stored.
    """

    def __init__(self, accounts: Mapping[str, Account] | None = None, *, limit: int = MAX_ACCOUNTS) -> None:
        self._accounts = dict(accounts or {})
        self._limit = limit
        self._checked: Counter[str] = Counter()  # attempts that are being checked
        self._names: dict[str, set[str]] = {}  # that have signed in from an address
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._accounts)

    def refuse(self, keys: Collection[str], now: float) -> None:
        """Return if an attempt may be queued.

        :raises Throttled: one of the keys must wait.
        """
        found = [account for key in keys if (account := self._accounts.get(key))]  # others may change the table
        wait = max([account.until - now for account in found], default=0.0)
        if wait > 0:
            raise Throttled(
                "Too many attempts to sign in",
                why="passwords were wrong several times for this name or from this address",
                fix=f"wait {duration(wait, up=True)}, then try again",
                retry_after=wait,
            )

    def admit(self, keys: Collection[str], now: float) -> None:
        """Admit one attempt, for all `keys` or none.

        :raises Throttled: one of them must wait; `retry_after` says how long.
        """
        with self._lock:
            self.refuse(keys, now)
            for key in keys:
                failures = round(self._failures(key, now))
                if (checked := self._checked[key]) and failures + checked >= self._rule(key).free:
                    raise Throttled("Too many attempts to sign in at once", fix="try again soon", retry_after=1.0)
            self._checked.update(keys)

    def failed(self, keys: Collection[str], now: float) -> Changes:
        """Count a wrong password for all `keys`."""
        changed: Changes = {}
        with self._lock:
            self._release(keys)
            for key in keys:
                failures = self._failures(key, now) + 1
                until = now + self._rule(key).delay(failures)
                changed[key] = self._accounts[key] = Account(failures, now, until)
            if len(self._accounts) > self._limit:
                changed.update(self._evict(set(changed), now))
        return changed

    def succeeded(self, keys: Collection[str], now: float) -> Changes:
        """Forget the wrong passwords of a name or device that has entered the right one, also in its address."""
        addresses = [key for key in keys if key.startswith("address:")]
        own = [key for key in keys if key not in addresses]
        changed: Changes = {}
        with self._lock:
            self._release(keys)
            forgiven = sum(self._failures(key, now) for key in own)
            for key in own:
                changed.update(self._forget(key))
            for key in addresses:
                names = self._names.setdefault(key, set())
                names.update(own if len(names) < MAX_NAMES else ())
                if (account := self._accounts.get(key)) is not None and (forgiven or account.until > now):
                    failures = max(0.0, self._failures(key, now) - forgiven)
                    changed[key] = self._accounts[key] = Account(failures, account.last, now)
            if len(self._names) > self._limit:
                del self._names[next(iter(self._names))]
        return changed

    def released(self, keys: Collection[str]) -> None:
        """The password was not checked."""
        with self._lock:
            self._release(keys)

    def forget(self, key: str) -> Changes:
        """Delete an account."""
        with self._lock:
            return self._forget(key)

    def _forget(self, key: str) -> Changes:
        return {key: None} if self._accounts.pop(key, None) else {}

    def _release(self, keys: Collection[str]) -> None:
        self._checked.subtract(keys)
        for key in keys:
            if self._checked[key] <= 0:
                del self._checked[key]

    def _rule(self, key: str) -> Rule:
        if not key.startswith("address:"):
            return NAME
        return replace(ADDRESS, free=ADDRESS.free + len(self._names.get(key, ())))

    def _failures(self, key: str, now: float) -> float:
        """Return the number of wrong passwords that still count."""
        account = self._accounts.get(key)
        if account is None or now - account.last > FORGET:
            return 0.0
        return max(0.0, account.failures - max(0.0, now - account.last) / self._rule(key).forgive)

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
