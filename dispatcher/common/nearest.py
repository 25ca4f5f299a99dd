"""The name that was probably meant, for errors about an unknown one.  Pure."""

from __future__ import annotations

from collections.abc import Iterable

CUTOFF = 0.6  # of difflib's ratio: two letters swapped or one missing in a short word


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the nearest of the known names, or ""; first one that begins with `word`."""
    import difflib  # loaded for an error, not at every start of the command line

    names = {name.lower(): name for name in known}
    word = word.lower()
    longer = [name for name in names if len(word) > 2 and name.startswith(word)]
    near = longer[:1] or difflib.get_close_matches(word, names, 1, CUTOFF)
    return names[near[0]] if near else ""
