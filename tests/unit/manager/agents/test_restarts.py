"""What observations, failures and deaths mean."""

import dataclasses

import pytest

from dispatcher.config.load import AppDefaults
from dispatcher.plugin.errors import (
    ConfigError,
    DeadlineExceeded,
    ProviderError,
    StartFailed,
    Unavailable,
    Unsupported,
)
from dispatcher.manager.agents import restarts
from dispatcher.manager.storage.rows import Desired, Kind, Pending
from dispatcher.manager.storage.rows import AgentRow
from dispatcher.plugin.model import BackendState as B
from dispatcher.plugin.model import Endpoint, Observation

NOW = 1000.0
RUNNING = AgentRow(
    id=1,
    version=1,
    name="alice",
    user="alice",
    user_id=1,
    app="demo",
    provider="fake",
    uid=5,
    created=0.0,
    since=0.0,
    desired=Desired.RUNNING,
    observed=B.RUNNING,
    ready=True,
    endpoint="tcp:127.0.0.1:80",
    started_at=500.0,
    spec_hash="abc",
)


def seen(state, **more):
    return Observation(state=state, **more)


def notice(row, observation, *, policy=None, log=(), host_restarted=False):
    return restarts.noticed(
        row, observation, now=NOW, policy=policy or AppDefaults(), log=log, host_restarted=host_restarted
    )


def test_what_is_as_it_was_changes_nothing():
    assert notice(RUNNING, seen(B.RUNNING, started_at=500.9, endpoint=Endpoint.tcp("127.0.0.1", 80))) is None
    assert notice(RUNNING, seen(B.RUNNING)) is None
    stopped = dataclasses.replace(
        RUNNING, **{**notice(RUNNING, seen(B.STOPPED)).fields, "desired": Desired.STOPPED}
    )
    assert notice(stopped, seen(B.STOPPED)) is None


def test_who_started_anew_must_prove_that_it_is_ready():
    change = notice(RUNNING, seen(B.RUNNING, started_at=700.0, endpoint=Endpoint.tcp("127.0.0.1", 81)))
    assert change.fields["ready"] is False
    assert change.fields["endpoint"] == "tcp:127.0.0.1:81"
    asleep = dataclasses.replace(RUNNING, observed=B.SUSPENDED, ready=False)
    assert notice(asleep, seen(B.RUNNING)).fields["ready"] is False


def test_the_start_is_the_last_one_and_is_kept_where_a_list_does_not_tell():
    assert notice(RUNNING, seen(B.RUNNING, started_at=700.0)).fields["started_at"] == 700.0
    asleep = dataclasses.replace(RUNNING, observed=B.SUSPENDED, ready=False)
    assert notice(asleep, seen(B.RUNNING)).fields["started_at"] == RUNNING.started_at
    stopped = dataclasses.replace(RUNNING, observed=B.STOPPED, started_at=None)
    assert notice(stopped, seen(B.RUNNING)).fields["started_at"] is None
    assert notice(stopped, seen(B.RUNNING, started_at=900.0)).fields["started_at"] == 900.0


def test_what_is_gone_has_no_endpoint_and_keeps_its_reason():
    change = notice(RUNNING, seen(B.STOPPED, exit_reason="out of memory"))
    assert (change.fields["endpoint"], change.fields["spec_hash"], change.fields["ready"]) == ("", "", False)
    assert change.fields["exit_reason"] == "out of memory"
    gone = dataclasses.replace(
        RUNNING, **{k: v for k, v in change.fields.items() if k != "observed"}, observed=B.STOPPED
    )
    assert notice(gone, seen(B.ABSENT)).fields["exit_reason"] == "out of memory"


def test_a_first_death_is_answered_at_once():
    change = notice(RUNNING, seen(B.STOPPED, exit_reason="exit code 1"))
    assert ("died", "exit code 1") in change.events
    assert change.fields["attempts"] == (NOW,)
    assert change.fields["failure"] is None


def test_a_second_death_waits_and_says_why():
    row = dataclasses.replace(RUNNING, attempts=(NOW - 10,))
    change = notice(row, seen(B.STOPPED, exit_reason="exit code 1"), log=["last words"])
    assert change.fields["retry_at"] == NOW + 1
    assert change.fields["failure"].log == ("last words",)


@pytest.mark.parametrize(
    ("reason", "log", "memory", "fix"),
    [
        ("out of memory", [], "512M", "raise `memory` of the app (it is 512.0 MiB), or"),
        ("exit code 1", ["Traceback", "numpy._ArrayMemoryError: Unable"], "1G", "raise `memory` of the app (it is 1.0 GiB), or"),
        ("exit code 1", ["MemoryError"], None, "iB, by default), or"),
        ("exit code 1", ["MemoryError"], False, ""),
        ("exit code 1", ["ValueError"], "1G", ""),
    ],
)  # fmt: skip
def test_an_end_for_want_of_memory_names_the_limit(reason, log, memory, fix):
    row = dataclasses.replace(RUNNING, attempts=(NOW - 10,))
    found = notice(row, seen(B.STOPPED, exit_reason=reason), log=log, policy=AppDefaults(memory=memory))
    told = found.fields["failure"].fix
    assert fix in told if fix else told == ""


def test_one_death_too_many_is_the_end():
    row = dataclasses.replace(RUNNING, attempts=(NOW - 10, NOW - 5))
    change = notice(row, seen(B.ABSENT), policy=AppDefaults(max_restarts=2))
    assert change.fields["retry_at"] is None
    assert "3 times within ten minutes" in change.fields["failure"].what
    assert [kind for kind, _ in change.events] == ["died", "failed"]


def test_the_end_of_the_host_is_nobody_s_fault():
    change = notice(RUNNING, seen(B.ABSENT), policy=AppDefaults(max_restarts=0), host_restarted=True)
    assert change.events == [("died", "the host was restarted")]
    assert "failure" not in change.fields


@pytest.mark.parametrize("desired", [Desired.STOPPED, Desired.SUSPENDED, Desired.ABSENT])
def test_an_end_that_nobody_minds_is_no_death(desired):
    change = notice(dataclasses.replace(RUNNING, desired=desired), seen(B.ABSENT))
    assert change.events == [("stopped", "it no longer exists on the backend")]
    assert "attempts" not in change.fields


def test_an_end_during_a_restart_is_no_death():
    row = dataclasses.replace(RUNNING, pending=Pending.RESTART)
    assert not restarts.died(row, seen(B.STOPPED))


def failed(kind, error, *, row=RUNNING, observation=None, policy=None, log=()):
    return restarts.failed(
        row, kind, error, seen=observation, now=NOW, policy=policy or AppDefaults(), log=log
    ).fields


def test_a_start_that_failed_is_tried_again_and_then_given_up():
    fields = failed(Kind.START, StartFailed("No", why="w", fix="f"), log=["a"])
    assert fields["retry_at"] == NOW + 1
    assert (fields["failure"].what, fields["failure"].log) == ("No", ("a",))
    row = dataclasses.replace(RUNNING, attempts=(NOW,) * 5)
    assert failed(Kind.START, StartFailed("No"), row=row)["retry_at"] is None


def test_the_error_s_own_log_is_the_better_one_and_is_bounded():
    error = StartFailed("No", details={"log": [str(number) for number in range(100)]})
    assert failed(Kind.START, error, log=["other"])["failure"].log == tuple(str(n) for n in range(80, 100))


@pytest.mark.parametrize("error", [ConfigError("No app"), Unsupported("Cannot")])
def test_what_can_never_work_is_not_tried_again(error):
    fields = failed(Kind.START, error)
    assert fields["retry_at"] is None
    assert fields["failure"].final


def test_a_backend_that_is_away_costs_no_try():
    fields = failed(Kind.START, Unavailable("Away"))
    assert fields["attempts"] == ()
    assert fields["retry_at"] == NOW + restarts.UNAVAILABLE_RETRY
    assert failed(Kind.START, DeadlineExceeded("Slow"))["attempts"] == (NOW,)


@pytest.mark.parametrize("kind", [Kind.STOP, Kind.RESET, Kind.REMOVE])
def test_ends_are_tried_for_ever(kind):
    row = dataclasses.replace(RUNNING, attempts=(NOW,) * 50)
    assert failed(kind, ProviderError("No"), row=row)["retry_at"] == NOW + restarts.MAX_RETRY


def test_every_operation_has_a_sentence_for_its_failure():
    for kind in Kind:
        change = restarts.failed(
            RUNNING, kind, ProviderError("No"), seen=None, now=NOW, policy=AppDefaults(), log=()
        )
        assert change.events[0][1].startswith("It could not be ")
