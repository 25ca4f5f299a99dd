"""Passwords: argon2id, alike for unknown names, in a pool that is bounded in every direction."""

from __future__ import annotations

import os
import threading
import time

import pytest

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import BadRequest, DeadlineExceeded, TooManyRequests, Unavailable
from dispatcher.manager.auth.hashing import MEMORY_KIB, PASSES, Hasher, HashPool, check_length

CHEAP = Hasher(memory=64, passes=1)


def test_hashes_are_argon2id_salted_and_verify():
    one, other = CHEAP.hash("correct horse"), CHEAP.hash("correct horse")
    assert one.startswith("$argon2id$")
    assert one != other
    assert "correct" not in one
    assert CHEAP.verify(one, "correct horse")
    assert not CHEAP.verify(one, "correct horsf")


@pytest.mark.parametrize(
    ("chosen", "typed"),
    [
        ("man\u0303ana por la", "ma\u00f1ana por la"),  # a tilde of its own
        ("correct\u00a0horse\u2003battery", "correct horse battery"),  # no-break and em blanks
        ("\ud800 half a pair", "\ud800 half a pair"),
    ],
)
def test_a_password_is_the_same_however_a_keyboard_sends_it(chosen, typed):
    assert CHEAP.verify(CHEAP.hash(chosen), typed)
    assert CHEAP.verify(CHEAP.hash(typed), chosen)


def test_letters_that_only_look_alike_are_different():
    assert not CHEAP.verify(CHEAP.hash("\ufb01sh and chips"), "fish and chips")
    assert not CHEAP.verify(CHEAP.hash("Mañana por la"), "mañana por la")


def test_accents_of_their_own_make_a_password_no_longer():
    with pytest.raises(BadRequest, match="it has 4 characters"):
        check_length("e\u0301" * 4)
    check_length("e\u0301" * 8)
    began = time.thread_time()
    CHEAP.verify(CHEAP.hash("x" * 8), "a" + "\u0301\u0323" * 100_000)
    assert time.thread_time() - began < 1


@pytest.mark.parametrize("stored", ["", "nonsense", "$argon2id$v=19$m=64,t=1,p=1$!!$!!", "$2b$12$abc"])
def test_a_damaged_hash_fits_no_password(stored):
    assert not CHEAP.verify(stored, "correct horse")


def test_no_hash_takes_as_long_and_fits_nothing():
    hasher = Hasher(memory=16384, passes=2)
    stored = hasher.hash("correct horse")
    hasher.warm()

    def fastest(known):
        times = []
        for _ in range(5):
            began = time.thread_time()
            assert not hasher.verify(known, "wrong password")
            times.append(time.thread_time() - began)
        return min(times)

    assert fastest(None) == pytest.approx(fastest(stored), rel=0.5)


def test_other_parameters_are_outdated():
    assert not CHEAP.outdated(CHEAP.hash("x" * 8))
    assert Hasher(memory=128, passes=1).outdated(CHEAP.hash("x" * 8))


def test_the_parameters_hold_what_is_advised():
    stored = Hasher().hash("correct horse")
    assert f"m={MEMORY_KIB},t={PASSES},p=1" in stored
    assert MEMORY_KIB >= 19 * 1024
    assert MEMORY_KIB * PASSES >= 19 * 1024 * 2


def test_the_memory_of_a_check_is_given_back():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024

    hasher, pool = Hasher(), HashPool(2, 10)
    stored = hasher.hash("correct horse")
    before = resident()
    threads = [
        threading.Thread(target=lambda: pool.run(lambda: hasher.verify(stored, "wrong"), Deadline(30)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.close()
    assert resident() - before < MEMORY_KIB / 4


@pytest.mark.parametrize("length", [0, 7, 1025])
def test_lengths_that_are_refused_never_show_the_password(length):
    with pytest.raises(BadRequest) as caught:
        check_length("s" * length)
    assert "sss" not in str(caught.value)
    check_length("x" * 8)
    check_length("x" * 1024)


def test_the_pool_runs_so_many_and_lets_so_many_wait():
    pool, go, running = HashPool(2, 3), threading.Event(), []

    def work():
        running.append(threading.get_ident())
        go.wait(10)
        return "done"

    results = []
    threads = [threading.Thread(target=lambda: results.append(pool.run(work, Deadline(10)))) for _ in range(5)]
    for thread in threads:
        thread.start()
    while pool.present < 5 or len(running) < 2:
        time.sleep(0.001)
    with pytest.raises(TooManyRequests) as caught:
        pool.run(work, Deadline(10))
    assert caught.value.retry_after
    assert len(running) == 2
    go.set()
    for thread in threads:
        thread.join()
    assert results == ["done"] * 5
    assert pool.run(lambda: 1, Deadline(1)) == 1
    assert pool.present == 0
    pool.close()


def test_no_address_and_no_name_fills_the_queue():
    pool, go = HashPool(2, 62), threading.Event()
    refused, threads = [], []

    def check(name, address):
        try:
            pool.run(lambda: go.wait(120), Deadline(240), [f"name:{name}", f"address:{address}"])
        except TooManyRequests:
            refused.append((name, address))

    def start(name, address):
        before = pool.present, len(refused)
        threads.append(threading.Thread(target=check, args=(name, address)))
        threads[-1].start()
        while (pool.present, len(refused)) == before:
            time.sleep(0.001)

    for number in range(40):
        start(f"guess{number}", "203.0.113.1")
    assert len(refused) == 8, "an address has half"
    for number in range(18):
        start("mallory", f"198.51.100.{number}")
    assert len(refused) == 10, "a name has a quarter"
    start("alice", "192.0.2.1")
    assert len(refused) == 10
    go.set()
    for thread in threads:
        thread.join()
    refused.clear()
    check("guess", "203.0.113.1")
    assert (refused, pool.present) == ([], 0), "places are given back"
    pool.close()


def test_a_check_that_hangs_is_an_outage_and_one_that_waits_too_long_a_crowd():
    pool, go = HashPool(1, 1), threading.Event()
    with pytest.raises(Unavailable) as hangs:
        pool.run(lambda: go.wait(10), Deadline(0.01))
    assert not isinstance(hangs.value, DeadlineExceeded)
    assert pool.present == 1
    with pytest.raises(DeadlineExceeded):
        pool.run(lambda: 1, Deadline(0.01))
    assert pool.present == 1
    go.set()
    assert pool.run(lambda: 2, Deadline(5)) == 2
    pool.close()


def test_what_the_work_raises_comes_through():
    pool = HashPool(1, 1)
    with pytest.raises(TimeoutError):
        pool.run(lambda: (_ for _ in ()).throw(TimeoutError("of its own")), Deadline(5))
    with pytest.raises(ZeroDivisionError):
        pool.run(lambda: 1 / 0, Deadline(5))
    assert pool.present == 0
    pool.close()


def test_strangers_leave_places_for_known_browsers():
    pool, go, threads, refused = HashPool(2, 62), threading.Event(), [], []

    def check(number):
        try:
            pool.run(lambda: go.wait(10), Deadline(10), [f"name:{number}", f"address:{number}"])
        except TooManyRequests:
            refused.append(number)

    for number in range(100):
        threads.append(threading.Thread(target=check, args=(number,)))
        threads[-1].start()
    while len(refused) < 44:
        time.sleep(0.001)
    assert pool.present == 56
    known = threading.Thread(target=lambda: pool.run(lambda: None, Deadline(10), ["device:a"]))
    known.start()
    while pool.present < 57:
        time.sleep(0.001)
    go.set()
    for thread in (*threads, known):
        thread.join()
    pool.close()
