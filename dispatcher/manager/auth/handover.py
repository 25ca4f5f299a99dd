"""Codes that transfer a sign-in from the portal to an agent's own host (subdomain routing).  In memory only.

A code is valid once, for 30 seconds, on one host, and for the browser that has the nonce: a link sent to
another person does not sign them in as the sender.  A restart of the manager invalidates all codes; the portal
makes new ones.
"""

from __future__ import annotations

import hmac
import threading
from dataclasses import dataclass

from dispatcher.manager.auth.sessions import digest, new_token
from dispatcher.plugin.errors import Forbidden

LIFETIME = 30.0  # seconds
MAX_CODES = 20  # of one user: nobody can push out another's


@dataclass(frozen=True, slots=True)
class Handover:
    """The sign-in that a code transfers."""

    user: str
    parent: str  # SHA-256 of the session
    agent: str
    host: str
    nonce_sha256: str
    until: float


class HandoverCodes:
    """Valid codes; only their SHA-256 is kept."""

    def __init__(self) -> None:
        self._codes: dict[str, Handover] = {}
        self._lock = threading.Lock()

    def issue(self, user: str, parent: str, agent: str, host: str, nonce_sha256: str, now: float) -> str:
        """Return a new code."""
        code = new_token()
        with self._lock:
            self._codes = {key: each for key, each in self._codes.items() if each.until > now}
            own = [key for key, each in self._codes.items() if each.user == user]
            for key in own[: 1 - MAX_CODES]:  # all but the newest
                del self._codes[key]
            self._codes[digest(code)] = Handover(user, parent, agent, host, nonce_sha256, now + LIFETIME)
        return code

    def redeem(self, code: str, nonce: str, host: str, now: float) -> Handover:
        """Return the sign-in of a code, and invalidate the code.

        :raises Forbidden: unknown, used, expired, for another host or another browser: the same error.
        """
        with self._lock:
            found = self._codes.pop(digest(code), None)
        good = found is not None and found.until > now and hmac.compare_digest(found.host, host)
        if found is None or not good or not hmac.compare_digest(found.nonce_sha256, digest(nonce)):
            raise Forbidden("The sign-in could not be transferred", fix="open the app again from the dashboard")
        return found
