"""The form of API tokens and their scopes, for the manager, the edge and the command line.  Pure.

A token is a prefix, which scanners for leaked secrets recognise, and 256 random bits in base64url.
"""

from __future__ import annotations

PREFIX = "dsp_"
SIZE = len(PREFIX) + 43  # characters of a token
DEFAULT_EXPIRY = "90d"
NEVER = "never"

#: What a token may do, the least first.
SCOPES = {
    "metrics": "GET /metrics of the manager, and nothing else",
    "read": "read requests of the manager's REST interface, without the output of apps",
    "admin": "all requests of the manager's REST interface",
    "app": "reach the agents of its user through the proxy",
}
#: Scopes that include another one.
INCLUDES = {"admin": frozenset({"admin", "read", "metrics"}), "read": frozenset({"read", "metrics"})}


def allows(scopes: tuple[str, ...], needed: str) -> bool:
    """Whether one of a token's scopes is the needed one, or includes it."""
    return any(needed in INCLUDES.get(scope, {scope}) for scope in scopes)


def described() -> str:
    """Return the scopes with their meaning, as one line."""
    return "; ".join(f"{name}: {text}" for name, text in SCOPES.items())
