"""libvirt: calls with deadlines, and lost connections.

Against libvirt's own in-memory driver (test:///default), which needs no daemon.
"""

import gc
import threading
import time

import pytest

libvirt = pytest.importorskip("libvirt")

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import (
    Cancelled,
    DeadlineExceeded,
    DispatcherError,
    Unavailable,
)
from dispatcher_libvirt.connection import MAX_CALLS, Backend, Lane


@pytest.fixture
def backend():
    backend = Backend("test:///default", connections=2, keepalive=5)
    yield backend
    backend.close()


def test_calls_return_the_answer_of_libvirt(backend):
    assert backend.call(lambda c: c.getHostname(), what="asking", deadline=Deadline(5))
    assert backend.call(lambda c: c.getType(), what="asking", deadline=Deadline(5), lane=Lane.WORK) == "TEST"


def test_a_call_that_hangs_ends_at_its_deadline_and_delays_no_other(backend):
    release = threading.Event()
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="did not answer in time"):
        backend.call(lambda c: release.wait(10), what="hanging", deadline=Deadline(0.2))
    assert time.monotonic() - began < 2
    assert backend.call(lambda c: c.getType(), what="asking", deadline=Deadline(5)) == "TEST"
    release.set()


def test_cancelling_ends_the_waiting(backend):
    release = threading.Event()

    def cancel():
        raise Cancelled("no longer wanted")

    with pytest.raises(Cancelled):
        backend.call(lambda c: release.wait(10), what="hanging", deadline=Deadline(9), tick=cancel)
    release.set()


def test_too_many_hanging_calls_are_refused_at_once(backend):
    release = threading.Event()
    backend.call(lambda c: 0, what="connecting", deadline=Deadline(5))
    for _ in range(MAX_CALLS):
        with pytest.raises(DeadlineExceeded):
            backend.call(lambda c: release.wait(20), what="hanging", deadline=Deadline(0.0))
    began = time.monotonic()
    with pytest.raises(Unavailable, match="are waiting for an answer"):
        backend.call(lambda c: 0, what="asking", deadline=Deadline(5))
    assert time.monotonic() - began < 1
    release.set()
    end = time.monotonic() + 5
    while True:
        try:
            assert backend.call(lambda c: 7, what="asking", deadline=Deadline(5)) == 7
            break
        except Unavailable:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_lost_connection_is_reopened(backend):
    calls = []

    def ask(connection):
        calls.append(id(connection))
        if len(calls) == 1:
            error = libvirt.libvirtError("gone")
            error.err = (
                libvirt.VIR_ERR_SYSTEM_ERROR,
                libvirt.VIR_FROM_RPC,
                "End of file",
                2,
                None,
                None,
                None,
                0,
                0,
            )
            raise error
        return "answer"

    assert backend.call(ask, what="asking", deadline=Deadline(5)) == "answer"
    assert len(calls) == 2
    calls.clear()
    with pytest.raises(Unavailable):  # work may have been done, so it is not done twice
        backend.call(ask, what="working", deadline=Deadline(5), lane=Lane.WORK)
    assert len(calls) == 1


def test_a_connection_is_never_closed_under_a_call(backend):
    """libvirt frees a closed connection while another thread still calls it."""
    entered, release, seen = threading.Event(), threading.Event(), []

    def slow(connection):
        entered.set()
        release.wait(10)
        seen.append(connection.getType())

    with pytest.raises(DeadlineExceeded):
        backend.call(slow, what="asking", deadline=Deadline(0.3))
    assert entered.is_set()
    backend.close()
    gc.collect()
    release.set()
    end = time.monotonic() + 5
    while not seen and time.monotonic() < end:
        time.sleep(0.01)
    assert seen == ["TEST"]


@pytest.mark.parametrize(
    ("uri", "what"),
    [
        ("qemu+unix:///system?socket=/nonexistent/socket", "libvirt does not answer on this host"),
        ("qemu+tcp://127.0.0.1:9/system", "The host 127.0.0.1 cannot be reached through libvirt"),
    ],
)
def test_a_stopped_daemon_and_an_unreachable_host_are_distinguished(uri, what):
    backend = Backend(uri, connections=1, keepalive=5)
    with pytest.raises(Unavailable, match=what) as caught:
        backend.call(lambda c: c.getType(), what="asking", deadline=Deadline(5))
    assert caught.value.why
    assert caught.value.fix
    assert isinstance(caught.value.__cause__, libvirt.libvirtError)
    backend.close()


def test_no_error_of_libvirt_escapes(backend):
    for lane in Lane:
        with pytest.raises(DispatcherError):
            backend.call(lambda c: c.lookupByName("none"), what="looking", deadline=Deadline(5), lane=lane)
