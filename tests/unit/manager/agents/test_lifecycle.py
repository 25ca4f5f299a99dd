"""The state machine: every combination has one sensible answer, and from everywhere it gets where it should."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.manager.agents.lifecycle import (
    ALIVE,
    ASLEEP,
    DEAD,
    Situation,
    State,
    feed_state,
    next_operation,
    public_state,
    reached,
    superseded,
)
from dispatcher.manager.agents.restarts import (
    MAX_BACKOFF,
    RESTART_WINDOW,
    after_death,
    after_failure,
    backoff,
    recent,
)
from dispatcher.manager.storage.rows import Desired, Kind, Pending
from dispatcher.plugin.model import BackendState as B

D, K, P = Desired, Kind, Pending


def situation(desired, observed, ready=False, **more):
    return Situation(desired=desired, observed=observed, ready=ready, **more)


def every_situation():
    for desired, observed, ready, reachable, operation, pending, moving, failed in itertools.product(
        Desired, B, (False, True), (False, True), (None, *Kind), Pending, (False, True), (False, True)
    ):
        for held in (False, True) if failed else (False,):
            yield Situation(
                desired=desired,
                observed=observed,
                ready=ready and observed is B.RUNNING,
                reachable=reachable,
                operation=operation,
                pending=pending,
                moving=moving,
                failed=failed,
                held=held,
            )


NEXT = [
    # desired, observed, ready -> what is done
    (D.RUNNING, B.ABSENT, False, K.START),
    (D.RUNNING, B.STOPPED, False, K.START),
    (D.RUNNING, B.STARTING, False, K.START),
    (D.RUNNING, B.RUNNING, False, K.START),
    (D.RUNNING, B.RUNNING, True, None),
    (D.RUNNING, B.SUSPENDED, False, K.START),
    (D.RUNNING, B.HIBERNATED, False, K.START),
    (D.SUSPENDED, B.ABSENT, False, None),
    (D.SUSPENDED, B.STOPPED, False, None),
    (D.SUSPENDED, B.STARTING, False, K.SUSPEND),
    (D.SUSPENDED, B.RUNNING, True, K.SUSPEND),
    (D.SUSPENDED, B.SUSPENDED, False, None),
    (D.SUSPENDED, B.HIBERNATED, False, None),
    (D.HIBERNATED, B.STOPPED, False, None),
    (D.HIBERNATED, B.RUNNING, True, K.HIBERNATE),
    (D.HIBERNATED, B.SUSPENDED, False, K.HIBERNATE),
    (D.HIBERNATED, B.HIBERNATED, False, None),
    (D.STOPPED, B.ABSENT, False, None),
    (D.STOPPED, B.STOPPED, False, None),
    (D.STOPPED, B.STARTING, False, K.STOP),
    (D.STOPPED, B.RUNNING, True, K.STOP),
    (D.STOPPED, B.SUSPENDED, False, K.STOP),
    (D.STOPPED, B.HIBERNATED, False, K.STOP),
    (D.ABSENT, B.RUNNING, True, K.REMOVE),
    (D.ABSENT, B.ABSENT, False, K.REMOVE),
]


@pytest.mark.parametrize(("desired", "observed", "ready", "expected"), NEXT)
def test_what_is_done_next(desired, observed, ready, expected):
    assert next_operation(situation(desired, observed, ready)) is expected


@pytest.mark.parametrize("observed", B)
def test_a_reset_comes_before_what_is_desired(observed):
    for desired in set(Desired) - {D.ABSENT}:
        assert next_operation(situation(desired, observed, pending=P.RESET)) is K.RESET
    assert next_operation(situation(D.ABSENT, observed, pending=P.RESET)) is K.REMOVE


@pytest.mark.parametrize("observed", B)
def test_a_restart_stops_what_lives_and_starts_what_does_not(observed):
    expected = K.STOP if observed in ALIVE else K.START
    assert next_operation(situation(D.RUNNING, observed, pending=P.RESTART)) is expected


@pytest.mark.parametrize("observed", B)
def test_an_app_that_moved_is_moved_at_the_next_start_only(observed):
    found = next_operation(situation(D.RUNNING, observed, observed is B.RUNNING, moving=True))
    expected = K.MOVE if observed in DEAD else None if observed is B.RUNNING else K.START
    assert found is expected
    assert next_operation(situation(D.STOPPED, observed, moving=True)) is not K.MOVE


def test_nothing_is_begun_beside_an_operation_in_back_off_or_on_a_backend_that_is_away():
    for now in every_situation():
        begun = next_operation(now)
        if now.operation or now.held:
            assert begun is None
        if not now.reachable and now.desired is not D.ABSENT:
            assert begun is None


def test_something_is_done_exactly_while_something_is_missing():
    for now in every_situation():
        if now.operation or now.held or not now.reachable:
            continue
        assert (next_operation(now) is None) == reached(now), now


def test_every_situation_has_a_public_and_a_feed_state_that_agree():
    pairs = {(public_state(now), feed_state(now)) for now in every_situation()}
    by_state = {state: {feed for public, feed in pairs if public is state} for state in State}
    assert set(by_state) == set(State)
    assert by_state[State.RUNNING] == {"running", "stopping"}  # stopping: nothing was begun yet
    assert by_state[State.STARTING] <= {"starting", "stopping"}
    assert by_state[State.SUSPENDING] == {"stopping"}
    assert by_state[State.STOPPING] == {"stopping"}
    assert by_state[State.REMOVING] == {"stopping"}
    assert by_state[State.STOPPED] == {"asleep"}
    assert by_state[State.SUSPENDED] <= {"asleep"}
    assert by_state[State.HIBERNATED] <= {"asleep"}


def test_requests_go_only_to_an_agent_that_is_ready():
    for now in every_situation():
        if feed_state(now) == "running":
            assert now.observed is B.RUNNING
            assert now.ready
            assert now.operation is None
            assert now.desired not in {D.STOPPED, D.ABSENT}


def test_an_agent_whose_backend_is_away_is_unknown_and_goes_on_being_served():
    now = situation(D.RUNNING, B.RUNNING, True, reachable=False)
    assert public_state(now) is State.UNKNOWN
    assert feed_state(now) == "running"


def test_while_a_backend_is_away_nothing_that_lived_becomes_stopped():
    for now in every_situation():
        if not now.reachable and now.observed in ALIVE and now.operation is None and now.desired is not D.ABSENT:
            assert public_state(now) is State.UNKNOWN


def test_an_agent_that_could_not_be_put_to_sleep_goes_on_being_served():
    now = situation(D.SUSPENDED, B.RUNNING, True, failed=True, held=True)
    assert public_state(now) is State.FAILED
    assert feed_state(now) == "running"


def test_a_failed_start_is_failed_for_all():
    now = situation(D.RUNNING, B.STOPPED, failed=True, held=True)
    assert public_state(now) is State.FAILED
    assert feed_state(now) == "failed"


@pytest.mark.parametrize(
    ("operation", "desired", "expected"),
    [
        (K.START, D.RUNNING, False),
        (K.START, D.SUSPENDED, False),
        (K.START, D.HIBERNATED, False),
        (K.START, D.STOPPED, True),
        (K.START, D.ABSENT, True),
        (K.MOVE, D.STOPPED, True),
        (K.MOVE, D.RUNNING, False),
        (K.SUSPEND, D.SUSPENDED, False),
        (K.SUSPEND, D.HIBERNATED, False),
        (K.SUSPEND, D.RUNNING, True),
        (K.HIBERNATE, D.STOPPED, True),
        (K.STOP, D.RUNNING, False),
        (K.RESET, D.ABSENT, False),
        (K.REMOVE, D.ABSENT, False),
    ],
)
def test_the_newest_intent_cancels_what_contradicts_it(operation, desired, expected):
    assert superseded(operation, desired, P.NONE) is expected


def test_a_restart_or_reset_cancels_starts_and_sleeps_but_no_stop():
    for pending in (P.RESTART, P.RESET):
        for kind in Kind:
            expected = kind in {K.START, K.MOVE, K.SUSPEND, K.HIBERNATE}
            assert superseded(kind, D.RUNNING, pending) is expected


# --- a perfect world: whatever is begun works


def carried_out(now: Situation, kind: Kind) -> Situation:
    if kind is K.START:
        pending = P.NONE if now.pending is P.RESTART else now.pending
        return dataclasses.replace(now, observed=B.RUNNING, ready=True, pending=pending)
    if kind is K.MOVE:
        return dataclasses.replace(now, observed=B.ABSENT, moving=False)
    if kind is K.STOP:
        pending = P.NONE if now.pending is P.RESTART else now.pending
        return dataclasses.replace(now, observed=B.STOPPED, ready=False, pending=pending)
    if kind is K.RESET:
        return dataclasses.replace(now, observed=B.ABSENT, ready=False, pending=P.NONE)
    return dataclasses.replace(now, observed=B.SUSPENDED if kind is K.SUSPEND else B.HIBERNATED, ready=False)


situations = st.builds(
    lambda desired, observed, ready, pending, moving: Situation(
        desired=desired,
        observed=observed,
        ready=ready and observed is B.RUNNING,
        pending=pending,
        moving=moving,
    ),
    st.sampled_from(list(Desired)),
    st.sampled_from(list(B)),
    st.booleans(),
    st.sampled_from(list(Pending)),
    st.booleans(),
)


@given(situations)
def test_from_everywhere_it_gets_where_it_should_in_few_steps(now):
    for _ in range(4):
        kind = next_operation(now)
        if kind is None:
            break
        if kind is K.REMOVE:
            return
        now = carried_out(now, kind)
    assert reached(now)


intents = st.lists(
    st.tuples(st.sampled_from([*Desired, "restart", "reset", "died", "away", "back", "step"])), max_size=30
)


@settings(max_examples=300)
@given(situations, intents)
def test_whatever_happens_on_the_way_it_settles(now, happenings):
    """Random intents, deaths and outages in the middle of operations; then quiet."""
    for (what,) in happenings:
        if what == "step":
            if now.operation is None:
                kind = next_operation(now)
                now = dataclasses.replace(now, operation=kind) if kind else now
            else:
                if now.operation is K.REMOVE:
                    return
                kind = now.operation
                cancelled = superseded(kind, now.desired, now.pending)
                now = dataclasses.replace(now, operation=None)
                now = now if cancelled else carried_out(now, kind)
        elif isinstance(what, Desired):
            if now.desired is not D.ABSENT:
                pending = now.pending if now.pending is P.RESET else P.NONE
                now = dataclasses.replace(now, desired=what, pending=pending)
        elif what in {"restart", "reset"}:
            if now.desired is not D.ABSENT:
                desired = D.RUNNING if what == "restart" else now.desired
                now = dataclasses.replace(now, desired=desired, pending=P(what))
        elif what == "died":
            now = dataclasses.replace(now, observed=B.STOPPED, ready=False)
        else:
            now = dataclasses.replace(now, reachable=what == "back")
        public_state(now)
        feed_state(now)
    if now.operation is K.REMOVE:
        return
    if now.operation:
        kind = now.operation
        now = carried_out(dataclasses.replace(now, operation=None), kind)
    now = dataclasses.replace(now, reachable=True)
    for _ in range(6):
        kind = next_operation(now)
        if kind is K.REMOVE:
            return
        if kind is None:
            break
        now = carried_out(now, kind)
    assert reached(now)


# --- trying again


def test_a_first_death_is_answered_at_once_and_the_next_ones_later_and_later():
    attempts, now, delays = (), 1000.0, []
    for _ in range(5):
        attempts, retry_at = after_death(attempts, now, 5)
        delays.append(retry_at - now)
        now = retry_at + 0.5
    assert delays == [0, 1, 2, 4, 8]
    assert after_death(attempts, now, 5)[1] is None


def test_deaths_long_ago_do_not_count():
    attempts, _ = after_death((0.0, 1.0, 2.0, 3.0, 4.0), RESTART_WINDOW + 3.5, 5)
    assert attempts == (4.0, RESTART_WINDOW + 3.5)
    assert recent((0.0, 10.0), RESTART_WINDOW) == (10.0,)


def test_a_failed_start_is_tried_again_and_then_given_up():
    attempts, now, delays = (), 0.0, []
    for _ in range(5):
        attempts, retry_at = after_failure(attempts, now, 5)
        delays.append(retry_at - now)
        now = retry_at
    assert delays == [1, 2, 4, 8, 16]
    assert after_failure(attempts, now, 5)[1] is None


def test_without_restarts_everything_is_given_up_at_once():
    assert after_death((), 5.0, 0) == ((), None)
    assert after_failure((), 5.0, 0) == ((5.0,), None)


def test_the_back_off_has_an_end():
    assert backoff(1) == 1
    assert backoff(1000) == MAX_BACKOFF


def test_asleep_and_dead_are_told_apart():
    assert ASLEEP < ALIVE
    assert not ALIVE & DEAD
    assert ALIVE | DEAD == set(B)
