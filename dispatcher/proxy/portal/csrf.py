"""Protection of state-changing requests against forgery.  Pure: headers and values in, a verdict out.

The portal shares its origin with apps (session routing) or its site (subdomain routing), keeps no key and may be
restarted at any time, so a form must pass three independent checks:

- the browser's metadata (`Sec-Fetch-*`, W3C Fetch Metadata; `Origin`, RFC 6454): a form is a top-level navigation
  from the same origin.  A script's `fetch`, a frame, another site and a sibling host are refused;
- a token in the form, ``NONCE.HMAC(seed, purpose, session, nonce)``, whose *seed* is a random cookie that scripts
  cannot read: it works in every tab, for as long as the browser runs, over any restart of the portal;
- the session: a form of one session is not valid in another.

Programs send JSON instead (a browser sends that to another origin only after a CORS preflight), and no fetch
metadata.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Iterable, Mapping

from dispatcher.proxy import origins

SEED = re.compile(r"[A-Za-z0-9_-]{43}")
_TOKEN = re.compile(r"[0-9a-f]{16}\.[0-9a-f]{64}")


def new_seed() -> str:
    """Return a random seed for the forms' cookie: 256 bits."""
    return secrets.token_urlsafe(32)


def token(seed: str, purpose: str, session: str = "") -> str:
    """Return a token for one form; different each time, so that compression of a page reveals nothing.

    :param purpose: what the form does; :param session: SHA-256 of the session's token, "" before the sign-in.
    """
    nonce = secrets.token_hex(8)
    return f"{nonce}.{_sign(seed, purpose, session, nonce)}"


def valid(given: str, seeds: Iterable[str], purpose: str, session: str = "") -> bool:
    """Whether a form's token was made from one of the browser's seeds, for this purpose and session."""
    if not _TOKEN.fullmatch(given):
        return False
    nonce, _, signature = given.partition(".")
    candidates = [seed for seed in seeds if SEED.fullmatch(seed)][:4]
    return any(hmac.compare_digest(_sign(seed, purpose, session, nonce), signature) for seed in candidates)


def foreign(headers: Mapping[str, str], own: Collection[str], *, program: bool) -> tuple[str, str] | None:
    """Return why a state-changing request cannot come from a form of the portal (or a program), and what to do.

    :param own: the portal's origins on this host, the one of this request first.
    :param program: the body is JSON.
    """
    site, mode, destination = (headers.get(f"Sec-Fetch-{name}", "") for name in ("Site", "Mode", "Dest"))
    if fault := origins.fault(headers.get("Origin"), site, own):
        return fault
    why = ""
    if (program and (mode or site)) or mode not in {"", "navigate"}:
        why = "a page's script sent it"
    elif not program and destination not in {"", "document"}:
        why = "it comes from a frame in another page"
    return (why, "open the page yourself and try again") if why else None


def _sign(seed: str, purpose: str, session: str, nonce: str) -> str:
    message = f"{purpose}\0{session}\0{nonce}"
    return hmac.new(seed.encode(), message.encode(), hashlib.sha256).hexdigest()
