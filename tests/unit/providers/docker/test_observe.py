"""From what the engine says to observations: states, endpoints, reasons, images that changed."""

import pytest

from dispatcher.plugin.model import BackendState, Endpoint
from dispatcher_docker import observe

LABELS = {
    "dispatcher.hash": "h1",
    "dispatcher.image": "web:1",
    "dispatcher.image-id": "sha256:1",
    "dispatcher.endpoint": "unix:/run/a/s",
    "dispatcher.owner": "300001",
}


def inspection(status="running", labels=LABELS, ports=None, **state):
    return {
        "Id": "c1",
        "State": {"Status": status, "StartedAt": "2026-11-25T10:00:00.5Z", "ExitCode": 0, **state},
        "Config": {"Labels": labels},
        "NetworkSettings": {"Ports": ports or {}},
    }


def summary(state="running", status="Up 3 minutes", labels=LABELS, ports=()):
    return {"Id": "c1", "State": state, "Status": status, "Labels": labels, "Ports": list(ports), "Created": 1000}


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("created", BackendState.STOPPED),
        ("running", BackendState.RUNNING),
        ("paused", BackendState.SUSPENDED),
        ("restarting", BackendState.STARTING),
        ("exited", BackendState.STOPPED),
        ("dead", BackendState.STOPPED),
        ("removing", BackendState.STOPPED),
        ("something new", BackendState.STOPPED),
    ],
)
def test_states(word, state):
    assert observe.from_inspection(inspection(word), reach="").state is state
    assert observe.from_summary(summary(word), reach="").state is state


def test_both_ways_of_asking_agree():
    one, two = observe.from_inspection(inspection(), reach=""), observe.from_summary(summary(), reach="")
    for field in ("state", "endpoint", "owner_uid", "spec_hash", "exit_reason"):
        assert getattr(one, field) == getattr(two, field)
    assert one.endpoint == Endpoint.unix("/run/a/s")
    assert one.owner_uid == 300001
    assert one.started_at == 1795600800.5


def test_when_a_container_was_made_is_not_when_it_was_started():
    """A list of containers tells the former alone: a stopped one that was started again would look older than it is."""
    assert observe.from_summary(summary(), reach="").started_at is None


PORTED = {**LABELS, "dispatcher.endpoint": "port:8080/tcp", "dispatcher.owner": ""}


def test_a_port_is_learned_from_the_engine():
    seen = observe.from_inspection(
        inspection(
            labels=PORTED, ports={"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": "49153"}], "9/tcp": None}
        ),
        reach="",
    )
    assert seen.endpoint == Endpoint.tcp("127.0.0.1", 49153)
    seen = observe.from_summary(
        summary(
            labels=PORTED, ports=[{"IP": "127.0.0.1", "PrivatePort": 8080, "PublicPort": 49153, "Type": "tcp"}]
        ),
        reach="10.0.0.7",
    )
    assert seen.endpoint == Endpoint.tcp("10.0.0.7", 49153)
    assert seen.owner_uid is None


def test_a_port_that_is_not_published_yet_is_no_endpoint():
    assert observe.from_inspection(inspection(labels=PORTED), reach="").endpoint is None


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"ExitCode": 7}, "exit code 7"),
        ({"ExitCode": 0}, "exit code 0"),
        ({"ExitCode": 137}, "killed by signal 9"),
        ({"ExitCode": 137, "OOMKilled": True}, "out of memory"),
        ({"ExitCode": 1, "OOMKilled": True}, "out of memory"),
        ({"ExitCode": 255}, "exit code 255"),
    ],
)
def test_reasons(state, reason):
    assert observe.from_inspection(inspection("exited", **state), reach="").exit_reason == reason


def test_what_never_ran_has_no_reason():
    assert observe.from_inspection(inspection("created"), reach="").exit_reason == ""


def test_the_summary_s_words_hold_the_code():
    assert observe.from_summary(summary("exited", "Exited (3) 2 hours ago"), reach="").exit_reason == "exit code 3"


def test_an_image_that_changed_makes_outdated():
    seen = observe.from_inspection(inspection(), reach="", current_image="sha256:2")
    assert seen.spec_hash != "h1"
    assert "web:1 has changed" in seen.detail
    assert observe.from_inspection(inspection(), reach="", current_image="sha256:1").spec_hash == "h1"
    assert observe.from_inspection(inspection(), reach="", current_image="").spec_hash == "h1"


@pytest.mark.parametrize("labels", [None, {}, {"dispatcher.handle": "{"}, {"dispatcher.handle": '{"version": 9}'}])
def test_a_container_without_a_handle_is_nobody_s(labels):
    assert observe.handle_from(labels) is None


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("0001-01-01T00:00:00Z", None),
        ("", None),
        ("2026-11-25T10:00:00.123456789Z", 1795600800.123456789),
        ("2026-11-25T12:00:00+02:00", 1795600800.0),
    ],
)
def test_times(text, time):
    assert observe.unix_time(text) == (pytest.approx(time) if time else None)
