"""What repeated calls of a plugin leave in this process: descriptors, threads, zombies."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from dispatcher.testing.driver import expect
from dispatcher.testing.kit import eventually, zombies_of

SPARE = 2  # descriptors and threads that may be more for another reason


def expect_nothing_left(
    cycle: Callable[[], None],
    times: int,
    what: str,
    *,
    descriptors: str,
    threads: str,
    seconds: float = 1.0,
) -> None:
    """Expect that, after the first two, cycles leave nothing in this process.

    :param what: cycles of what, for the message; :param descriptors: what to do if they are left;
        :param threads: the same; :param seconds: until everything must have ended.
    """
    __tracebackhide__ = True
    cycle()
    cycle()
    before = {kind: count() for kind, (count, _) in _COUNTED.items()}
    for _ in range(times):
        cycle()
    advice = {"descriptors": descriptors, "threads": threads, "zombies": "wait for every child that has ended"}
    for kind, (count, spare) in _COUNTED.items():

        def more(kind: str = kind, count: Callable[[], int] = count) -> int:
            return count() - before[kind]

        expect(
            eventually(lambda more=more, spare=spare: more() <= spare, seconds, 0.05),  # type: ignore[misc]
            f"{times} {what} left {more()} {kind} behind: {advice[kind]}",
        )


_COUNTED: dict[str, tuple[Callable[[], int], int]] = {
    "descriptors": (lambda: len(os.listdir("/proc/self/fd")), SPARE),
    "zombies": (lambda: len(zombies_of()), 0),
    "threads": (threading.active_count, SPARE),
}
