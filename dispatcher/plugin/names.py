"""Names: rules, canonical form, and collision-free identifiers for backends.

A user's name may be an e-mail address.  Names are case-insensitive: they are stored case-folded, in Unicode
normal form NFKC, so `Alice` and `alice` are one person.  Identifiers on backends are `SLUG-HASH`, which is
legal everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata

from dispatcher.plugin.errors import BadRequest

MAX_NAME = 255
SLUG_LENGTH = 20
HASH_LENGTH = 12
_REMEMBERED = 16384  # agents whose keys are cached
_PUNCTUATION = frozenset("._-@+'")
_APP = re.compile(r"[a-z0-9]([a-z0-9_-]{0,30}[a-z0-9])?")


def user_name(raw: str) -> str:
    """Return the canonical form of a user's name.

    :raises BadRequest: empty, longer than 255 characters, or with a character that is not a letter, a
        digit or one of ``. _ - @ + '``; or not beginning with a letter or digit.
    """
    if not isinstance(raw, str) or not raw or len(raw) > MAX_NAME:
        raise BadRequest("Bad name", why=f"a name has 1 to {MAX_NAME} characters", fix="choose another name")
    name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", raw).casefold())
    if not name or len(name) > MAX_NAME:
        raise BadRequest("Bad name", why=f"a name has 1 to {MAX_NAME} characters", fix="choose another name")
    if not _word(name[0]):
        raise BadRequest(
            f"Bad name {printable(raw)}", why="it must begin with a letter or a digit", fix="choose another name"
        )
    for char in name:
        if not (_word(char) or char in _PUNCTUATION or unicodedata.category(char) in {"Mn", "Mc"}):
            raise BadRequest(
                f"Bad name {printable(raw)}",
                why=f"the character {printable(char)} is not allowed",
                fix="use letters, digits and . _ - @ + ' (an e-mail address is fine)",
            )
    if ".." in name:
        raise BadRequest(f"Bad name {printable(raw)}", why="it has two dots in a row", fix="choose another name")
    return name


def app_name(raw: str) -> str:
    """Return `raw` if it is a legal app or provider name: up to 32 of ``a-z 0-9 _ -``.

    :raises BadRequest: it is not.
    """
    if not isinstance(raw, str) or not _APP.fullmatch(raw):
        raise BadRequest(
            f"Bad app name {printable(raw)}", why="use 1 to 32 of a-z, 0-9, _ and -", fix="rename the app"
        )
    return raw


def agent_name(raw: str) -> str:
    """Return the canonical form of an agent's name: ``USER`` or ``USER:APP``.

    :raises BadRequest: either part is not legal.
    """
    user, colon, app = raw.partition(":") if isinstance(raw, str) else ("", "", "")
    return user_name(user) + (f":{app_name(app)}" if colon else "")


def slug(name: str) -> str:
    """Return a readable, lossy, DNS-safe form of a name: at most 20 of ``a-z 0-9 -``, never empty."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    text = re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")[:SLUG_LENGTH].strip("-")
    return text or "x"


@functools.lru_cache(maxsize=_REMEMBERED)
def digest(name: str) -> str:
    """Return 12 hexadecimal digits of the name's SHA-256."""
    return hashlib.sha256(name.encode()).hexdigest()[:HASH_LENGTH]


@functools.lru_cache(maxsize=_REMEMBERED)
def key(name: str) -> str:
    """Return the collision-free, DNS-safe key of an agent: ``SLUG-HASH``, at most 33 characters."""
    return f"{slug(name)}-{digest(name)}"


def backend_name(installation: str, name: str) -> str:
    """Return ``dispatcher-INSTALLATION-SLUG-HASH``, an agent's name on its backend: at most 53 characters."""
    return f"dispatcher-{installation}-{key(name)}"


def printable(text: object, limit: int = 80) -> str:
    """Return `text` quoted, with every control character escaped, cut to `limit` characters: safe for logs."""
    shown = repr(text if isinstance(text, str) else str(text)[: limit * 2])
    return shown if len(shown) <= limit else shown[: limit - 2] + "…'"


def _word(char: str) -> bool:
    return unicodedata.category(char) in {"Ll", "Lo", "Lm", "Lt", "Lu", "Nd"}
