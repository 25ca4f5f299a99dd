"""Short names for the levels of a finding."""

from __future__ import annotations

from dispatcher.plugin.model import Finding, Level


def ok(what: str) -> Finding:
    """Return a check that passed."""
    return Finding(level=Level.OK, what=what)


def info(what: str, fix: str = "") -> Finding:
    """Return a fact that may matter."""
    return Finding(level=Level.INFO, what=what, fix=fix)


def warning(what: str, fix: str) -> Finding:
    """Return a fault with which the installation works, less well or less safely."""
    return Finding(level=Level.WARNING, what=what, fix=fix)


def error(what: str, fix: str) -> Finding:
    """Return a fault that must be corrected."""
    return Finding(level=Level.ERROR, what=what, fix=fix)
