"""Who is idle, and what becomes of them."""

import pytest

from dispatcher.config.load import AppDefaults
from dispatcher.manager.agents.idle import MEMORY, CpuActivity
from dispatcher.manager.agents.idle import IdleDecision, check_interval, idle_action, idle_decision
from dispatcher.manager.storage.rows import Desired
from dispatcher.plugin.model import BackendState as B
from dispatcher.plugin.model import Capability

ALL = frozenset(Capability)


def decide(observed=B.RUNNING, unused=0.0, asleep=0.0, working=False, capabilities=ALL, **policy):
    found = idle_decision(
        AppDefaults(**policy), capabilities, observed, unused=unused, asleep=asleep, working=working
    )
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
    found = idle_decision(AppDefaults(), ALL, B.RUNNING, unused=7300, asleep=0, working=False)
    assert found == IdleDecision(Desired.SUSPENDED, "it was not used for 2 hours")


def test_checks_are_often_enough_for_the_shortest_timeout():
    assert check_interval([AppDefaults()]) == 5.0
    assert check_interval([AppDefaults(), AppDefaults(idle_timeout=2)]) == 0.5
    assert check_interval([AppDefaults(idle_timeout=0.1)]) == 0.2
    assert check_interval([AppDefaults(idle_timeout=False)]) == 5.0


def test_work_is_seen_from_two_samples():
    cpu = CpuActivity()
    assert cpu.may_work(1000.0), "not sampled yet"
    assert cpu.sample(10.0, 100.0) is None
    assert cpu.may_work(10.0), "one sample tells nothing"
    assert cpu.sample(20.0, 100.2) == pytest.approx(0.02)
    assert not cpu.may_work(20.0)
    assert cpu.sample(30.0, 105.2) == pytest.approx(0.5)
    assert cpu.may_work(31.0)
    assert cpu.sample(40.0, 1.0) is None  # started again: its CPU time began at 0
    assert cpu.sample(50.0 + MEMORY, 1.0) == 0.0
    assert not cpu.may_work(50.0 + MEMORY)


@pytest.mark.parametrize(
    ("burst", "pause", "works"),
    [
        (0.6, 60.0, False),  # once a minute for a moment: housekeeping
        (0.1, 5.0, False),  # often and little
        (5.0, 60.0, True),  # a job that runs in steps
        (1.0, 5.0, True),
    ],
)
def test_small_periodic_use_of_the_cpu_is_no_work(burst, pause, works):
    cpu, used = CpuActivity(), 0.0
    for second in range(0, 600, 5):
        used = burst * (1 + second // pause)
        cpu.sample(float(second), used)
        if second >= 2 * MEMORY:
            assert cpu.may_work(float(second)) == works, second
