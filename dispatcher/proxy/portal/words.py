"""Texts of the pages: states, times and browsers in words.  Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dispatcher.common.humanize import ago

#: State -> word and tone; the tones are classes of the style sheet.
STATES: Mapping[str, tuple[str, str]] = {
    "running": ("Running", "good"),
    "starting": ("Starting", "busy"),
    "suspending": ("Suspending", "busy"),
    "suspended": ("Asleep", "calm"),
    "hibernated": ("Asleep", "calm"),
    "stopping": ("Stopping", "busy"),
    "stopped": ("Stopped", "calm"),
    "removing": ("Being removed", "busy"),
    "failed": ("Failed", "bad"),
    "unknown": ("Unreachable", "bad"),
}
#: States in which an app does not run until it is started or woken.
ASLEEP = frozenset({"suspended", "hibernated", "stopped", "failed"})
_BROWSERS = (
    ("Edge", r"Edg(?:e|A|iOS)?/"),
    ("Opera", r"OPR/"),
    ("Firefox", r"(?:Firefox|FxiOS)/"),
    ("Chrome", r"(?:Chrome|CriOS|Chromium)/"),
    ("Safari", r"Safari/"),
    ("curl", r"curl/"),
)
_SYSTEMS = (
    ("Android", r"Android"),
    ("iPhone", r"iPhone"),
    ("iPad", r"iPad"),
    ("Windows", r"Windows"),
    ("macOS", r"Mac OS X|Macintosh"),
    ("ChromeOS", r"CrOS"),
    ("Linux", r"Linux|X11"),
)


def state(name: str) -> tuple[str, str]:
    """Return a state in words, and its tone."""
    return STATES.get(name, (name.capitalize(), "calm"))


def since(when: str | None, *, event: bool = False, now: float | None = None) -> str:
    """Return how long a state lasts, ``for 3 minutes``, or how long ago an event was; "" for None."""
    if when is None:
        return ""
    text = ago(when, now=now)
    return (
        text
        if event or text == "some time ago"
        else f"for {text.removesuffix(' ago')}".replace("just now", "a moment")
    )


def sentence(text: object, *, capital: bool = True) -> str:
    """Return a text as a sentence: a capital in front (if wanted), a full stop at the end."""
    shown = str(text).strip()
    if not shown:
        return ""
    first = shown[0].upper() if capital else shown[0]
    return first + shown[1:] + ("" if shown[-1] in ".!?…" else ".")


def browser(user_agent: str | None) -> str:
    """Return a browser's description of itself in words: ``Firefox on Linux``."""
    text = (user_agent or "")[:512]
    name = next((name for name, pattern in _BROWSERS if re.search(pattern, text)), "")
    system = next((name for name, pattern in _SYSTEMS if re.search(pattern, text)), "")
    if name and system:
        return f"{name} on {system}"
    return name or system or text.partition("/")[0][:40] or "Unknown browser"


def public_agent(agent: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an agent's view for its user, without details of the host."""
    shown = ("name", "app", "state", "stage", "detail", "fraction", "since", "last_used", "outdated")
    # The detail of an agent whose backend does not answer is the backend's error.
    return {name: agent.get(name) for name in shown} | ({"detail": ""} if agent["state"] == "unknown" else {})
