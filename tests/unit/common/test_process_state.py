"""What plugins change of the whole process is set back."""

import asyncio
import logging
import os
import resource
import socket
import sys
import threading

import pytest

from dispatcher.common import process_state


class Leaves(logging.Handler):
    def emit(self, record):
        raise SystemExit(1)


def lower(number):
    resource.setrlimit(number, (200, resource.getrlimit(number)[1]))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda: os.umask(0), "the umask"),
        (lambda: os.chdir("/proc"), "the working directory"),
        (lambda: logging.disable(logging.CRITICAL), "the level below which nothing is logged"),
        (lambda: logging.getLogger().addHandler(Leaves()), "the log of all modules"),
        (lambda: logging.getLogger("dispatcher").addFilter(lambda _: False), "the log dispatcher"),
        (lambda: threading.settrace(lambda *_: 1 / 0), "the trace of threads"),
        (lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 7), "the recursion limit"),
        (lambda: socket.setdefaulttimeout(0.001), "the time-out of sockets"),
        (lambda: lower(resource.RLIMIT_NOFILE), "the limit RLIMIT_NOFILE"),
        (lambda: setattr(sys, "stderr", None), "the standard streams"),
        (lambda: asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy()), "the event loops of asyncio"),
    ],
)
def test_a_change_is_found_and_set_back(change, name):
    before = process_state._snapshot()
    with process_state.unchanged() as changed:
        change()
        assert process_state._snapshot()[name] != before[name]
    assert changed == [name]
    assert process_state._snapshot() == before


def replaced(number):
    with open(__file__, "rb") as file:
        os.dup2(file.fileno(), number)


@pytest.mark.parametrize("change", [os.close, replaced])
def test_a_standard_descriptor_stays_what_it_is(change):
    before = os.fstat(0)
    with process_state.unchanged() as changed:
        change(0)
    assert changed == ["descriptor 0"]
    assert os.path.samestat(os.fstat(0), before)


def test_nothing_has_changed_and_nothing_is_left():
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(SystemExit), process_state.unchanged() as changed:
        raise SystemExit
    assert changed == []
    assert os.listdir("/proc/self/fd") == descriptors
