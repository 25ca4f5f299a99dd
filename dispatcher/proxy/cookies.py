"""The dispatcher's own cookies.

Over HTTPS the names carry the ``__Host-`` prefix (RFC 6265bis, 4.1.3.2): a browser then accepts such a cookie
only from this host, over TLS, without ``Domain``, so that neither a sibling host nor an agent can set it.
"""

from __future__ import annotations

from typing import NamedTuple


class Names(NamedTuple):
    """The names of all cookies.

    :ivar session: holds a session's token; :ivar device: proves an earlier sign-in from this browser.
    :ivar nonce: binds a handed-over sign-in to the host that requested it.
    :ivar signin: binds a sign-in at another site to the browser that began it.
    :ivar form: binds the portal's forms to the browser that displayed them.
    :ivar app: differs for each app that was opened: caches heed `Vary: Cookie` (session routing).
    """

    session: str = "dispatcher"
    device: str = "dispatcher-device"
    nonce: str = "dispatcher-nonce"
    signin: str = "dispatcher-signin"
    form: str = "dispatcher-form"
    app: str = "dispatcher-app"


_PLAIN = Names()
_SECURE = Names(*("__Host-" + name for name in _PLAIN))
#: Every name that is the dispatcher's, in either spelling: no agent sees or sets one of these.
OWN_NAMES = frozenset(_PLAIN + _SECURE)


def names(secure: bool) -> Names:
    """Return the names in use.

    :param secure: browsers reach the proxy over HTTPS (`Config.secure`).
    """
    return _SECURE if secure else _PLAIN


def values(field: str, name: str) -> list[str]:
    """Return the values of all cookies of this name in a Cookie field, as the edge reads them: quotes are kept."""
    if name not in field:
        return []
    pairs = (pair.partition("=") for pair in field.split(";"))
    return [value.strip(" \t") for found, _, value in pairs if found.strip(" \t") == name]


def sent_names(field: str) -> list[str]:
    """Return the names of all cookies in a Cookie field, each once, in their order."""
    names = (pair.partition("=")[0].strip(" \t") for pair in field.split(";"))
    return [name for name in dict.fromkeys(names) if name]
