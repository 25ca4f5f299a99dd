"""Names of the dispatcher's own cookies.

Over HTTPS the names carry the ``__Host-`` prefix (RFC 6265bis, 4.1.3.2): a browser then accepts such a cookie
only from this host, over TLS, without ``Domain``, so that neither a sibling host nor an agent can set it.
"""

from __future__ import annotations

_SESSION = "dispatcher"
_DEVICE = "dispatcher-device"
_NONCE = "dispatcher-nonce"
_FORM = "dispatcher-form"
_SECURE = "__Host-"


def session_cookie_name(secure: bool) -> str:
    """Return the name of the cookie that holds a session's token.

    :param secure: browsers reach the proxy over HTTPS (`Config.secure`).
    """
    return _SECURE + _SESSION if secure else _SESSION


def device_cookie_name(secure: bool) -> str:
    """Return the name of the cookie that proves an earlier sign-in from this browser."""
    return _SECURE + _DEVICE if secure else _DEVICE


def nonce_cookie_name(secure: bool) -> str:
    """Return the name of the cookie that binds a handed-over sign-in to the host that requested it."""
    return _SECURE + _NONCE if secure else _NONCE


def form_cookie_name(secure: bool) -> str:
    """Return the name of the cookie that binds the portal's forms to the browser that displayed them."""
    return _SECURE + _FORM if secure else _FORM


#: Every name that is the dispatcher's, in either spelling: no agent sees or sets one of these.
OWN_NAMES = frozenset(prefix + name for prefix in ("", _SECURE) for name in (_SESSION, _DEVICE, _NONCE, _FORM))
