"""libvirt: calls with deadlines, connections that are lost, errors in the project's words.

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
    Conflict,
    DeadlineExceeded,
    DispatcherError,
    NotFound,
    ProviderError,
    Unavailable,
)
from dispatcher.plugin.model import BackendState
from dispatcher_libvirt import domain_xml, errors_map, observing
from dispatcher_libvirt.connection import MOST_CALLS, Backend, Lane
from dispatcher_libvirt.domain import Label
from dispatcher_libvirt.machines import Found, Machines
from dispatcher_libvirt.workers import Workers

NAME = "dispatcher-0123abcd-alice-2bd806c97f0e"


@pytest.fixture
def backend():
    backend = Backend("test:///default", connections=2, keepalive=5)
    yield backend

    def clean(connection):  # all connections of a process to it share one host
        for domain in connection.listAllDomains():
            if domain.name() == NAME:
                if domain.isActive():
                    domain.destroy()
                domain.undefine()

    backend.call(clean, what="cleaning", deadline=Deadline(5))
    backend.close()


def label(**changes):
    values = {
        "installation": "0123abcd",
        "agent": "alice",
        "spec": "f" * 64,
        "started": 1.0,
        "data": '{"uid": 1}',
        "port": 18_001,
        "guest_port": 8080,
    }
    return Label(**values | changes)


def xml(name=NAME, own=None):
    from lxml import etree

    root = etree.Element("domain", type="test")
    etree.SubElement(root, "name").text = name
    etree.SubElement(root, "memory").text = "1024"
    etree.SubElement(etree.SubElement(root, "os"), "type").text = "hvm"
    if own:
        etree.SubElement(root, "metadata").append(domain_xml.label_element(own))
    return etree.tostring(root, encoding="unicode")


def test_calls_return_what_libvirt_says(backend):
    assert backend.call(lambda c: c.getHostname(), what="asking", deadline=Deadline(5))
    assert backend.call(lambda c: c.getType(), what="asking", deadline=Deadline(5), lane=Lane.WORK) == "TEST"


def test_a_call_that_hangs_ends_at_its_deadline_and_holds_up_nobody(backend):
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
    for _ in range(MOST_CALLS):
        with pytest.raises(DeadlineExceeded):
            backend.call(lambda c: release.wait(20), what="hanging", deadline=Deadline(0.0))
    began = time.monotonic()
    with pytest.raises(Unavailable, match="wait for an answer already"):
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


def test_a_connection_that_was_lost_is_made_again(backend):
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
    """libvirt would free it under the feet of the other thread."""
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
def test_a_daemon_that_does_not_run_and_a_host_out_of_reach_are_told_apart(uri, what):
    backend = Backend(uri, connections=1, keepalive=5)
    with pytest.raises(Unavailable, match=what) as caught:
        backend.call(lambda c: c.getType(), what="asking", deadline=Deadline(5))
    assert caught.value.why
    assert caught.value.fix
    assert isinstance(caught.value.__cause__, libvirt.libvirtError)
    backend.close()


def error_of(code, domain=libvirt.VIR_FROM_QEMU, text="words of libvirt"):
    error = libvirt.libvirtError("x")
    error.err = (code, domain, text, 2, None, None, None, 0, 0)
    return error


@pytest.mark.parametrize(
    ("error", "wanted", "words"),
    [
        (error_of(libvirt.VIR_ERR_AUTH_FAILED), ProviderError, "group libvirt"),
        (error_of(libvirt.VIR_ERR_NO_CONNECT), Unavailable, "start libvirtd"),
        (error_of(libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC), Unavailable, "start libvirtd"),
        (error_of(libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC), Unavailable, "start libvirtd"),
        (error_of(libvirt.VIR_ERR_NO_DOMAIN), NotFound, "start the agent again"),
        (error_of(libvirt.VIR_ERR_OPERATION_TIMEOUT), Unavailable, "try again"),
        (error_of(libvirt.VIR_ERR_NO_NETWORK), ProviderError, "net-list"),
        (
            error_of(libvirt.VIR_ERR_INTERNAL_ERROR, text="write: No space left on device"),
            ProviderError,
            "disk is full",
        ),
        (error_of(libvirt.VIR_ERR_INTERNAL_ERROR, text="Permission denied"), ProviderError, "may not use a file"),
        (error_of(libvirt.VIR_ERR_OPERATION_INVALID), Conflict, "look at the agent"),
        (error_of(libvirt.VIR_ERR_XML_INVALID_SCHEMA), ProviderError, "does not accept"),
        (
            error_of(libvirt.VIR_ERR_INTERNAL_ERROR, text="Cannot allocate memory"),
            ProviderError,
            "too little memory",
        ),
        (error_of(libvirt.VIR_ERR_INTERNAL_ERROR), ProviderError, "libvirt failed"),
    ],
)
def test_every_error_is_translated_with_what_to_do(error, wanted, words):
    made = errors_map.translate(error, "qemu:///system", "starting x")
    assert type(made) is wanted
    assert words in str(made)
    assert made.fix
    assert "words" in made.why or made.why


def test_long_words_of_libvirt_are_cut():
    assert len(errors_map.message(error_of(libvirt.VIR_ERR_INTERNAL_ERROR, text="x\n" * 5000))) <= 400


def test_machines_are_found_by_name_and_label(backend, monkeypatch):
    monkeypatch.setattr(libvirt, "VIR_DOMAIN_UNDEFINE_NVRAM", 0)  # the in-memory driver knows no such flag
    machines = Machines(backend, "0123abcd")
    assert machines.find(NAME, Deadline(5)) is None
    machines.define(xml(own=label()), NAME, Deadline(5))
    found = machines.find(NAME, Deadline(5))
    assert found.label == label()
    assert not found.active
    assert machines.start(NAME, Deadline(5), lambda: None) is True
    found = machines.find(NAME, Deadline(5))
    assert found.active
    seen = observing.observation(found)
    assert (seen.state, str(seen.endpoint), seen.started_at) == (BackendState.RUNNING, "tcp:127.0.0.1:18001", 1.0)
    machines.remove(NAME, Deadline(5))
    machines.remove(NAME, Deadline(5))
    assert machines.find(NAME, Deadline(5)) is None


@pytest.mark.parametrize("other", [None, label(installation="ffffffff")])
def test_somebody_elses_machine_is_never_touched(backend, other):
    machines = Machines(backend, "0123abcd")

    def define(connection):
        connection.defineXML(xml(own=other)).create()

    backend.call(define, what="defining", deadline=Deadline(5), lane=Lane.WORK)
    found = machines.find(NAME, Deadline(5))
    assert found.label is None
    assert machines.ours(found) is None
    assert observing.observation(found).state is BackendState.ABSENT
    machines.remove(NAME, Deadline(5))
    with pytest.raises(ProviderError, match="not the dispatcher's") as caught:
        machines.define(xml(own=label()), NAME, Deadline(5))
    assert "virsh" in caught.value.fix
    assert machines.find(NAME, Deadline(5)).active


@pytest.mark.parametrize(
    ("changes", "state", "reason"),
    [
        ({"id": 3, "state": libvirt.VIR_DOMAIN_RUNNING}, BackendState.RUNNING, ""),
        ({"id": 3, "state": libvirt.VIR_DOMAIN_SHUTDOWN}, BackendState.RUNNING, ""),
        ({"id": 3, "state": libvirt.VIR_DOMAIN_NOSTATE}, BackendState.STARTING, ""),
        ({"id": 3, "state": libvirt.VIR_DOMAIN_PAUSED, "reason": 1}, BackendState.SUSPENDED, ""),
        (
            {"id": 3, "state": libvirt.VIR_DOMAIN_PAUSED, "reason": libvirt.VIR_DOMAIN_PAUSED_STARTING_UP},
            BackendState.STARTING,
            "",
        ),
        (
            {"id": 3, "state": libvirt.VIR_DOMAIN_PAUSED, "reason": libvirt.VIR_DOMAIN_PAUSED_CRASHED},
            BackendState.STOPPED,
            "the guest crashed",
        ),
        ({"id": 3, "state": libvirt.VIR_DOMAIN_PMSUSPENDED}, BackendState.SUSPENDED, ""),
        ({"id": 3, "state": libvirt.VIR_DOMAIN_CRASHED}, BackendState.STOPPED, "the guest crashed"),
        ({"saved": True}, BackendState.HIBERNATED, ""),
        ({"reason": libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN}, BackendState.STOPPED, "the guest shut down"),
        ({"reason": libvirt.VIR_DOMAIN_SHUTOFF_CRASHED}, BackendState.STOPPED, "QEMU crashed or was killed"),
        ({"reason": libvirt.VIR_DOMAIN_SHUTOFF_FAILED}, BackendState.STOPPED, "QEMU did not start"),
        ({"reason": libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED}, BackendState.STOPPED, "ended by force through libvirt"),
        ({"reason": libvirt.VIR_DOMAIN_SHUTOFF_DAEMON}, BackendState.STOPPED, "while libvirtd was away"),
        ({"reason": 99}, BackendState.STOPPED, "ended"),
        ({"label": None, "id": 3}, BackendState.ABSENT, ""),
    ],
)
def test_states_of_libvirt_mean_states_of_agents(changes, state, reason):
    values = {
        "name": NAME,
        "uuid": "u",
        "id": -1,
        "state": libvirt.VIR_DOMAIN_SHUTOFF,
        "reason": 0,
        "saved": False,
        "label": label(),
    }
    seen = observing.observation(Found(**values | changes))
    assert seen.state is state
    assert reason in seen.exit_reason
    assert bool(reason) == bool(seen.exit_reason)
    if state in {BackendState.RUNNING, BackendState.SUSPENDED}:
        assert str(seen.endpoint) == "tcp:127.0.0.1:18001"
    if changes.get("id", -1) < 0:
        assert seen.endpoint is None


def test_places_of_other_networks():
    found = Found(name=NAME, uuid="u", id=1, state=1, reason=0, saved=False, label=label(port=0), cid=7)
    assert str(observing.endpoint(found)) == "vsock:7:8080"
    found = Found(name=NAME, uuid="u", id=1, state=1, reason=0, saved=False, label=label(port=0), host="192.0.2.7")
    assert str(observing.endpoint(found)) == "tcp:192.0.2.7:8080"
    found = Found(name=NAME, uuid="u", id=1, state=1, reason=0, saved=False, label=label(port=0))
    assert observing.endpoint(found) is None


def test_workers_end_by_themselves_and_carry_errors():
    workers = Workers(2)
    call = workers.submit(lambda: 1 / 0)
    assert call.wait(5)
    with pytest.raises(ZeroDivisionError):
        call.result()
    before = threading.active_count()
    workers.close()
    end = time.monotonic() + 5
    while threading.active_count() >= before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() < before


def test_no_error_of_libvirt_escapes(backend):
    for lane in Lane:
        with pytest.raises(DispatcherError):
            backend.call(lambda c: c.lookupByName("none"), what="looking", deadline=Deadline(5), lane=lane)
