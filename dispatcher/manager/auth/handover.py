"""Codes that carry a sign-in from the portal to an agent's own host (subdomain routing).  Pure, in memory.

A code is single use, lives 30 seconds, and works only on the host it was made for, for the browser that holds
the nonce: a link sent to somebody else does not sign them in as the sender.  After a restart of the manager a code
of before does not work, and the portal makes another.
"""

from __future__ import annotations

import hmac
import threading
from dataclasses import dataclass

from dispatcher.manager.auth.sessions import digest, new_token
from dispatcher.plugin.errors import Forbidden

LIFETIME = 30.0  # seconds
MAX_CODES = 10_000


@dataclass(frozen=True, slots=True)
class Handover:
    """What a code stands for."""

    parent: str  # SHA-256 of the session
    agent: str
    host: str
    nonce_sha256: str
    until: float


class HandoverCodes:
    """The codes that may still be redeemed; only their SHA-256 is kept."""

    def __init__(self) -> None:
        self._codes: dict[str, Handover] = {}
        self._lock = threading.Lock()

    def issue(self, parent: str, agent: str, host: str, nonce_sha256: str, now: float) -> str:
        """Return a new code."""
        code = new_token()
        with self._lock:
            while self._codes:  # in the order of their ends
                oldest = next(iter(self._codes))
                if self._codes[oldest].until > now and len(self._codes) < MAX_CODES:
                    break
                del self._codes[oldest]
            self._codes[digest(code)] = Handover(parent, agent, host, nonce_sha256, now + LIFETIME)
        return code

    def redeem(self, code: str, nonce: str, host: str, now: float) -> Handover:
        """Return what a code stands for; whatever comes of it, the code is used up.

        :raises Forbidden: unknown, used, too old, of another host or another browser: all alike.
        """
        with self._lock:
            found = self._codes.pop(digest(code), None)
        good = found is not None and found.until > now and hmac.compare_digest(found.host, host)
        if found is None or not good or not hmac.compare_digest(found.nonce_sha256, digest(nonce)):
            raise Forbidden("The sign-in could not be carried over", fix="open the app again from the dashboard")
        return found
