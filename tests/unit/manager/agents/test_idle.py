"""Who is idle, and what becomes of them."""

from types import SimpleNamespace

import pytest

from dispatcher.config.load import AppDefaults
from dispatcher.manager.agents.idle import Rest, check_interval, idle_action, note_cpu, rest, words
from dispatcher.manager.agents.lifecycle import Desired
from dispatcher.plugin.model import BackendState as B
from dispatcher.plugin.model import Capability

ALL = frozenset(Capability)


def decide(observed=B.RUNNING, unused=0.0, asleep=0.0, working=False, capabilities=ALL, **policy):
    found = rest(AppDefaults(**policy), capabilities, observed, unused=unused, asleep=asleep, working=working)
    return found and found.desired


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"unused": 1799}, None),
        ({"unused": 1800}, Desired.SUSPENDED),
        ({"unused": 10, "idle_timeout": 5}, Desired.SUSPENDED),
        ({"unused": 1e9, "idle_timeout": False}, None),
        ({"unused": 9999, "idle_action": "hibernate"}, Desired.HIBERNATED),
        ({"unused": 9999, "idle_action": "stop"}, Desired.STOPPED),
        ({"unused": 9999, "observed": B.STOPPED}, None),
        ({"unused": 9999, "observed": B.STARTING}, None),
        ({"observed": B.SUSPENDED, "asleep": 1e9}, None),
        ({"observed": B.SUSPENDED, "asleep": 100, "idle_stop": 100}, Desired.STOPPED),
        ({"observed": B.HIBERNATED, "asleep": 99, "idle_stop": 100}, None),
        # a long job after the browser was closed can be protected, then stops
        ({"unused": 2000, "working": True}, Desired.SUSPENDED),
        ({"unused": 2000, "working": True, "busy_grace": 600}, None),
        ({"unused": 2000, "working": False, "busy_grace": 600}, Desired.SUSPENDED),
        ({"unused": 2401, "working": True, "busy_grace": 600}, Desired.SUSPENDED),
    ],
)
def test_who_rests(facts, expected):
    assert decide(**facts) is expected


@pytest.mark.parametrize(
    ("action", "missing", "expected"),
    [
        ("suspend", set(), Desired.SUSPENDED),
        ("suspend", {Capability.SUSPEND}, Desired.HIBERNATED),
        ("suspend", {Capability.SUSPEND, Capability.HIBERNATE}, Desired.STOPPED),
        ("hibernate", {Capability.HIBERNATE}, Desired.SUSPENDED),
        ("hibernate", {Capability.SUSPEND, Capability.HIBERNATE}, Desired.STOPPED),
        ("stop", set(), Desired.STOPPED),
    ],
)
def test_agents_rest_as_near_to_the_configuration_as_the_provider_can(action, missing, expected):
    assert idle_action(AppDefaults(idle_action=action), ALL - missing) is expected


def test_the_reason_says_how_long():
    found = rest(AppDefaults(), ALL, B.RUNNING, unused=7300, asleep=0, working=False)
    assert found == Rest(Desired.SUSPENDED, "nobody used it for 2 hours")


def test_checks_are_often_enough_for_the_shortest_timeout():
    assert check_interval([AppDefaults()]) == 5.0
    assert check_interval([AppDefaults(), AppDefaults(idle_timeout=2)]) == 0.5
    assert check_interval([AppDefaults(idle_timeout=0.1)]) == 0.2
    assert check_interval([AppDefaults(idle_timeout=False)]) == 5.0


def test_work_is_seen_from_two_samples():
    agent = SimpleNamespace(cpu=None, worked=0.0, judged=0.0)
    assert note_cpu(agent, 10.0, 100.0) is None
    assert note_cpu(agent, 20.0, 100.2) == pytest.approx(0.02)
    assert agent.worked == 0.0
    assert note_cpu(agent, 30.0, 105.2) == pytest.approx(0.5)
    assert agent.worked == 30.0
    assert note_cpu(agent, 40.0, 1.0) is None  # started anew


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-1, "0 s"),
        (0, "0 s"),
        (59, "59 s"),
        (60, "1 minute"),
        (7199, "1 hour"),
        (7200, "2 hours"),
        (1e6, "11 days"),
    ],
)
def test_lengths_of_time_in_words(seconds, expected):
    assert words(seconds) == expected
