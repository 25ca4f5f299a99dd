"""Guessing is slowed per name and per address; who knows the password is not."""

from __future__ import annotations

import pytest

from dispatcher.plugin.errors import TooManyRequests
from dispatcher.manager.auth.throttle import ADDRESS, FORGET, NAME, Throttle, address_key


def attempt(throttle, keys, now, right=False):
    """Return the seconds to wait, 0 when the attempt was let through."""
    try:
        throttle.admit(keys, now)
    except TooManyRequests as error:
        return error.retry_after
    if right:
        throttle.succeeded(keys, now)
    else:
        throttle.failed(keys, now)
    return 0


def guess_for(throttle, keys, seconds, now=0.0):
    """Guess as often as allowed; return how many guesses came through."""
    end, guesses = now + seconds, 0
    while now < end:
        wait = attempt(throttle, keys, now)
        guesses += not wait
        now += wait or 0.001
    return guesses


def test_the_delay_grows_and_is_bounded():
    throttle, now, waits = Throttle(), 0.0, []
    for _ in range(30):
        throttle.admit(["name:alice"], now)
        waits.append(throttle.failed(["name:alice"], now)["name:alice"].until - now)
        now += waits[-1] + 1e-6
    assert waits[: NAME.free - 1] == [0.0] * (NAME.free - 1)
    assert waits[NAME.free] >= 1.0
    assert all(later >= earlier - 1e-6 for earlier, later in zip(waits, waits[1:]))
    assert waits[-1] == pytest.approx(NAME.most)


def test_a_thousand_guesses_at_one_name_take_days_from_however_many_addresses():
    throttle = Throttle()
    for number in range(1000):
        attempt(throttle, ["name:alice", f"address:{number}"], 0.0)
    assert guess_for(throttle, ["name:alice"], 24 * 3600.0, now=1.0) < 200


def test_one_guess_at_a_thousand_names_from_one_address_is_slowed():
    throttle, through = Throttle(), 0
    for number in range(1000):
        through += not attempt(throttle, [f"name:{number}", "address:192.0.2.1"], 0.0)
    assert through <= ADDRESS.free
    assert attempt(throttle, ["name:new", "address:192.0.2.2"], 0.0) == 0


def test_many_at_once_with_the_right_password_are_not_slowed():
    throttle = Throttle()
    for number in range(ADDRESS.free):
        throttle.admit([f"name:{number}", "address:192.0.2.1"], 0.0)  # all in flight at the same time
    for number in range(ADDRESS.free):
        throttle.succeeded([f"name:{number}", "address:192.0.2.1"], 0.1)
    assert attempt(throttle, ["name:7", "address:192.0.2.1"], 0.2, right=True) == 0


def test_a_burst_gains_nothing_once_slowed():
    throttle, now = Throttle(), 0.0
    for _ in range(10):
        now += attempt(throttle, ["name:alice"], now)
        attempt(throttle, ["name:alice"], now)
    now += attempt(throttle, ["name:alice"], now) + 1
    throttle.admit(["name:alice"], now)
    with pytest.raises(TooManyRequests):  # the first is still being checked
        throttle.admit(["name:alice"], now)


def test_sixty_guesses_at_once_are_not_all_checked_and_the_owner_waits_a_second():
    throttle, checked = Throttle(), 0
    for number in range(60):
        try:
            throttle.admit(["name:alice", f"address:{number}"], 0.0)
            checked += 1
        except TooManyRequests as error:
            assert error.retry_after == 1.0
    assert checked == NAME.free
    for number in range(checked):
        throttle.failed(["name:alice", f"address:{number}"], 0.1)
    assert attempt(throttle, ["name:alice", "address:owner"], 0.2) <= 1.0
    assert attempt(throttle, ["name:alice", "address:owner"], 1.2, right=True) == 0


def test_an_attempt_that_was_not_checked_counts_for_nothing():
    throttle = Throttle()
    for _ in range(100):
        throttle.admit(["name:alice", "address:192.0.2.1"], 0.0)
        throttle.released(["name:alice", "address:192.0.2.1"])
    assert attempt(throttle, ["name:alice", "address:192.0.2.1"], 0.0) == 0


@pytest.mark.parametrize("first", ["typos", "right passwords", "in turn"])
def test_a_class_behind_one_address_gets_in_within_seconds(first):
    throttle, now, waits = Throttle(), 0.0, []
    students = [(f"name:{number}", wrong) for number in range(200) for wrong in [True, False][number % 5 > 0 :]]
    if first != "in turn":
        students.sort(key=lambda each: each[1], reverse=first == "typos")
    for name, wrong in students:
        while wait := attempt(throttle, [name, "address:192.0.2.1"], now, right=not wrong):
            waits.append(wait)
            now += wait
    assert sum(wrong for _, wrong in students) == 40
    assert sum(waits) < 5


def test_the_right_password_gives_back_what_its_name_had_cost_and_no_more():
    throttle = Throttle()
    for number in range(3):
        attempt(throttle, [f"name:{number}", "address:192.0.2.1"], 0.0)
    for _ in range(4):
        attempt(throttle, ["name:alice", "address:192.0.2.1"], 0.0)
    for _ in range(10):
        attempt(throttle, ["name:alice", "address:192.0.2.1"], 0.0, right=True)
    for _ in range(NAME.free):
        assert attempt(throttle, ["name:alice"], 0.0) == 0
    through = sum(not attempt(throttle, [f"name:{n + 9}", "address:192.0.2.1"], 0.0) for n in range(100))
    assert through == ADDRESS.free + 1 - 3


def test_what_was_wrong_is_forgiven_with_time():
    throttle = Throttle()
    for _ in range(NAME.free):
        attempt(throttle, ["name:alice"], 0.0)
    assert attempt(throttle, ["name:alice"], 0.5) > 0
    assert guess_for(throttle, ["name:alice"], 1.0, now=FORGET + 1) >= NAME.free


def test_a_restart_forgets_nothing():
    throttle, kept = Throttle(), {}
    for _ in range(NAME.free + 3):
        try:
            throttle.admit(["name:alice"], 0.0)
            kept |= throttle.failed(["name:alice"], 0.0)
        except TooManyRequests:
            break
    again = Throttle({key: account for key, account in kept.items() if account})
    with pytest.raises(TooManyRequests) as caught:
        again.admit(["name:alice"], 0.1)
    assert caught.value.retry_after == pytest.approx(0.9)


def test_accounts_are_bounded_and_the_guilty_stay():
    throttle = Throttle(limit=100)
    for _ in range(NAME.free):
        attempt(throttle, ["name:victim"], 0.0)
    gone = {}
    for number in range(1000):
        throttle.admit([f"name:{number}"], 1.0)
        gone |= throttle.failed([f"name:{number}"], 1.0)
        assert len(throttle) <= 101
    assert None in gone.values()
    assert attempt(throttle, ["name:victim"], 0.5) > 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("", "nonsense\n", True),
    ],
)
def test_addresses_are_counted_by_who_can_have_them(one, other, same):
    assert (address_key(one) == address_key(other)) is same


def test_five_guesses_are_free_however_slowly_they_come():
    for pause in (0.1, 1.0, 10.0):
        throttle = Throttle()
        waits = [attempt(throttle, ["name:alice"], number * pause) for number in range(NAME.free)]
        assert waits == [0] * NAME.free
        with pytest.raises(TooManyRequests):
            throttle.refuse(["name:alice"], (NAME.free - 1) * pause + 0.05)


def test_an_account_that_is_dropped_during_a_check_harms_nothing():
    class Dropping(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            self.pop(key, None)
            return found

    throttle = Throttle()
    throttle.failed(["name:alice"], 0.0)
    throttle._accounts = Dropping(throttle._accounts)
    throttle.refuse(["name:alice"], 0.0)
