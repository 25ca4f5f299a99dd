"""Joining a log stream to lines that are known already, without loss or duplicates.  Pure."""

from __future__ import annotations


class LogJoiner:
    """Joins a stream that begins with some of the last lines to the known ones.

    :param known: the newest last; the stream may begin anywhere in it.
    """

    def __init__(self, known: list[str]) -> None:
        self._known = known
        self._places = list(range(len(known) + 1))  # where in `known` the next line may be
        self._held: list[str] = []
        self._joined = not known

    def new(self, line: str) -> list[str]:
        """Take a line of the stream; return the lines that turn out to be new."""
        if self._joined:
            return [line]
        known = self._known
        following = [place + 1 for place in self._places if place < len(known) and known[place] == line]
        if following and len(self._held) < len(known):
            self._places = following
            self._held.append(line)
            return []
        self._joined = True
        # Either all held lines are the end of what is known, or the stream began after it.
        return [line] if len(known) in self._places else [*self._held, line]
