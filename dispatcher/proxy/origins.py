"""One rule for the origins (RFC 6454) of changes: the portal's forms, requests to apps, WebSockets.  Pure."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit


def origin(url: str) -> str:
    """Return ``SCHEME://HOST[:PORT]`` of a URL as browsers write it in `Origin`, or "" when it has none."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return ""
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        return ""
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    default = 443 if parts.scheme == "https" else 80
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in {None, default} else "")


def fault(sender: str | None, site: str, own: Collection[str]) -> tuple[str, str] | None:
    """Return why a request does not come from a page of one's own, and what to do; None if it does.

    :param sender: the `Origin` field, None without one; :param site: `Sec-Fetch-Site`, "" without it.
    :param own: the origins here, the one of this request first.
    """
    # A page with the policy `no-referrer` sends `Origin: null`; the browser still reports its site.
    if sender is None or (sender, site) == ("null", "same-origin"):
        if site in {"", "same-origin", "none"}:
            return None
        return "it comes from another site", "open the page yourself and try again"
    if (origin(sender) or sender) in own:
        return None
    if fix := _front_proxy_fix(sender, next(iter(own)), site):
        return "the browser reports another address of this page than the front proxy", fix
    why = "it comes from another site" if sender != "null" else "the browser does not send its origin"
    return why, "open the page yourself and try again"


def _front_proxy_fix(sender: str, own: str, site: str) -> str:
    """Return what to set in a front proxy that hides the address in the browser, "" if it is not at fault."""
    try:
        theirs, ours = urlsplit(sender), urlsplit(own)
        other_port = theirs.port is None and ours.port is not None and theirs.hostname == ours.hostname
    except ValueError:
        return ""
    if not (site == "same-origin" or (not site and theirs.hostname == ours.hostname)):
        return ""
    default = "443" if theirs.scheme == "https" else "80"
    named = {
        "X-Forwarded-Proto": theirs.scheme if theirs.scheme != ours.scheme else "",
        "X-Forwarded-Host": theirs.netloc if theirs.netloc != ours.netloc else "",
        # The port of "X-Forwarded-Port" is added to a host without one.
        "X-Forwarded-Port": default if other_port else "",
    }
    *others, last = [f"{name}: {value}" for name, value in named.items() if value] or [""]
    fields = f"{', '.join(others)} and {last}" if others else last
    return f"let the front proxy send {fields} and list it in proxy.trusted_proxies, or set proxy.public_url"
