"""Valid targets of redirects: paths of the same origin, and hosts of agents.  Pure."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

MAX_TARGET = 8192
_ROUNDS = 4  # of percent-decoding; deeper nesting is refused
#: What a browser or a careless decoder could take for the beginning of another host: ``//``, ``/\``, ``/<TAB>/``.
_OTHER_HOST = re.compile(r"[\x00-\x20\x7f-\xa0]*[/\\][\x00-\x20\x7f-\xa0]*[/\\]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SAFE = "%/?#[]@!$&'()*+,;=:-._~"
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def own_path(raw: str | None, prefix: str) -> str:
    """Return `raw` if it is a path (with query) of the same origin, percent-encoded; otherwise ``/``.

    Absolute URLs, spellings that some browser or server reads as another host (percent-encoded ones too), control
    characters, and the pages of sign-in and sign-out are refused.

    :param prefix: path of the portal.
    """
    if not raw or len(raw) > MAX_TARGET or raw[0] != "/" or _CONTROL.search(raw) or "\\" in raw:
        return "/"
    path = re.split(r"[?#]", raw, maxsplit=1)[0]
    for _ in range(_ROUNDS):
        if _OTHER_HOST.match(path):
            return "/"
        decoded = unquote(path, "latin-1")  # byte by byte, in any encoding
        if decoded == path:
            break
        path = decoded
    else:
        return "/"
    steps = ("login", "logout", "signed-out", "start/", "callback/", "backchannel/")
    if any(
        path == f"{prefix}/{step}" or (step[-1] == "/" and path.startswith(f"{prefix}/{step}")) for step in steps
    ):
        return "/"
    return quote(raw, safe=_SAFE)


def agent_host(host: str, public_host: str) -> str:
    """Return the canonical form of an agent's host, ``LABEL.PUBLIC_HOST``, or "" if it is not one.

    :param public_host: host (and port, when not the scheme's own) of the portal.
    """
    label, dot, rest = host.lower().partition(".")
    return host.lower() if dot and rest == public_host.lower() and _LABEL.fullmatch(label) else ""
