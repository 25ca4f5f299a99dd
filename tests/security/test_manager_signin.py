"""Attacks on the sign-in, against the real manager: guessing, telling names apart, exhausting, forging its log."""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from dispatcher.client.manager_client import ManagerClient
from dispatcher.plugin.errors import BadRequest, DispatcherError, Forbidden, NotFound, TooManyRequests
from tests.support.installation import PASSWORD, Installation, UnixConnection

ADDRESS = "192.0.2.1"


@pytest.fixture
def site(short_tmp):
    with Installation(short_tmp) as site:
        site.start("manager")
        site.add("alice")
        yield site


@pytest.fixture
def proxy(site):
    client = proxy_of(site)
    yield client
    client.close()


def proxy_of(site):
    return ManagerClient(f"unix://{site.base}/run/proxy.sock")


def outcome(work):
    """Return the name of the error, or "in"."""
    try:
        work()
    except DispatcherError as error:
        return type(error).__name__
    return "in"


def memory(site, what="VmRSS"):
    """KiB of the manager's process."""
    with open(f"/proc/{site.processes['manager'].pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what))


def test_a_thousand_guesses_get_nowhere_and_the_owner_still_gets_in(site, proxy):
    device = proxy.login("alice", PASSWORD, "203.0.113.1")["device"]

    def guess(number):
        address = f"198.51.{number // 250}.{number % 250}"
        return outcome(lambda: proxy.login("alice", f"guess number {number}", address))

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(guess, range(1000)))
    looked_at = results.count("Forbidden")
    assert set(results) == {"Forbidden", "TooManyRequests"}
    assert looked_at < 60  # a first burst from everywhere, then one at a time

    def guess_when_it_is_looked_at():
        while guess(2000) == "TooManyRequests":
            time.sleep(0.1)

    guess_when_it_is_looked_at()
    with pytest.raises(TooManyRequests):
        proxy.login("alice", PASSWORD, "203.0.113.2")
    assert proxy.login("alice", PASSWORD, "203.0.113.1", None, device)["session"]["user"] == "alice"
    site.kill("manager")
    site.start("manager")
    guess_when_it_is_looked_at()  # one wrong guess has no delay, unless those of before are still counted
    with pytest.raises(TooManyRequests) as caught:
        proxy.login("alice", PASSWORD, "203.0.113.2")
    assert caught.value.retry_after >= 1
    assert proxy.login("alice", PASSWORD, "203.0.113.1", None, device)["session"]["user"] == "alice"


def test_one_guess_at_a_thousand_names_is_slowed_and_costs_no_memory(site, proxy):

    def guess(number):
        return outcome(lambda: proxy.login(f"user{number}", "password1", ADDRESS))

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(guess, range(1000)))
    assert results.count("Forbidden") < 100
    assert results.count("TooManyRequests") > 900
    assert memory(site) < 150 * 1024
    assert proxy.login("alice", PASSWORD, "203.0.113.1")["session"]["user"] == "alice"


def test_known_and_unknown_names_get_the_same_answer_in_the_same_time(site):
    def raw(name, number):
        connection = UnixConnection(site.base / "run/proxy.sock")
        body = {"user": name, "password": "wrong password", "address": f"198.51.100.{number}"}
        began = time.perf_counter()
        connection.request("POST", "/sessions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        took = time.perf_counter() - began
        connection.close()
        headers = {name: value for name, value in answer.getheaders() if name != "Date"}
        return answer.status, headers, content, took

    ratios = []
    for round in range(3):  # the machine may be busy: a real difference shows in every round
        site.add(f"known{round}")
        known, unknown = [], []
        for number in range(4):  # below what is slowed, so that each is looked at
            known.append(raw(f"known{round}", 10 * round + number))
            unknown.append(raw(f"nobody{round}", 100 + 10 * round + number))
        assert {(status, content) for status, _, content, _ in known + unknown} == {(403, known[0][2])}
        assert all(headers == known[0][1] for _, headers, _, _ in known + unknown)
        fastest = [min(took for *_, took in side) for side in (known, unknown)]
        assert min(fastest) > 0.005  # both looked at a hash
        ratios.append(max(fastest) / min(fastest))
    assert min(ratios) < 1.5, ratios


def test_two_hundred_sign_ins_at_once_are_bounded_and_affect_no_other_user(site):
    for number in range(8):
        site.add(f"user{number}")
    before = memory(site)
    results, slowest, stop = [], [], threading.Event()
    admin = ManagerClient(f"unix://{site.base}/run/manager.sock")
    bystander = proxy_of(site)
    session = bystander.login("alice", PASSWORD, "203.0.113.1")["session"]["sha256"]

    def others():
        while not stop.is_set():
            began = time.monotonic()
            admin.healthz()
            bystander.lookup(session)
            slowest.append(time.monotonic() - began)
            time.sleep(0.02)

    def sign_in(number):
        client = proxy_of(site)
        try:
            client.login(f"user{number % 8}", PASSWORD, f"198.51.100.{number}")
            results.append(("in", None))
        except TooManyRequests as error:
            results.append(("TooManyRequests", error.retry_after))
        finally:
            client.close()

    watcher = threading.Thread(target=others)
    watcher.start()
    threads = [threading.Thread(target=sign_in, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    outcomes = [name for name, _ in results]
    assert outcomes.count("in") >= 58  # two at a time, 56 waiting (of 64 places, an eighth is for known browsers)
    assert outcomes.count("in") + outcomes.count("TooManyRequests") == 200
    assert all(retry for name, retry in results if name == "TooManyRequests")
    assert statistics.median(slowest) < 0.5
    assert memory(site, "VmHWM") - before < 2 * 46 * 1024 + 80 * 1024
    time.sleep(0.5)
    assert memory(site) - before < 40 * 1024
    admin.close()
    bystander.close()


def test_a_class_behind_one_address_gets_in_within_seconds(short_tmp):
    """As in `test_throttle.py` with 200 students; here each password is checked."""
    app = '[apps.web]\nmax_restarts = 0\n[apps.web.subprocess]\ncommand = ["/usr/bin/false", "{{socket}}"]\n'
    delays = []

    def sign_in(number):
        client, name = proxy_of(site), f"student{number}"
        if number < 40:
            assert outcome(lambda: client.login(name, "a typo", ADDRESS)) in {"Forbidden", "TooManyRequests"}
        while True:
            try:
                return client.login(name, PASSWORD, ADDRESS)["session"]["user"]
            except TooManyRequests as error:
                delays.append(error.retry_after)
                time.sleep(error.retry_after)
            finally:
                client.close()

    with Installation(short_tmp, app) as site:
        site.start("manager")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(site.add, (f"student{number}" for number in range(200))))
        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(sign_in, range(50))) == [f"student{number}" for number in range(50)]
    assert sum(delays) < 10, delays


NASTY = [
    "alice\n2026-01-01T00:00:00Z INFO    signed in user=root",
    "\x1b[2J\x1b[31malice",
    "alice\r\nSet-Cookie: x=y",
    "a\x00b",
    "\u202ealice",
    "<script>alert(1)</script>",
    "x" * 255,
]


def test_nothing_that_is_sent_forges_a_line_or_leaves_a_secret_in_the_log(site, proxy):
    secret = "Tr0ub4dor-and-3"
    for number, name in enumerate(NASTY):
        with pytest.raises((Forbidden, BadRequest)):
            proxy.login(name, secret, f"192.0.2.{number}", name)
    token = proxy.login("alice", PASSWORD, ADDRESS, "agent\n\x1b[31m")["token"]
    connection = UnixConnection(site.base / "run/manager.sock")
    for path in (f"/agents?password={secret}", f"/agents/alice%0Aforged?token={token}", f"/nope/{token}"):
        connection.request("GET", path)
        connection.getresponse().read()
    large = json.dumps({"name": "x" * 1_000_000})
    with suppress(OSError):  # refused before it is read
        connection.request("POST", "/agents", large, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 413
    connection.close()
    site.processes["manager"].terminate()
    site.processes["manager"].wait(20)
    text = (site.base / "manager.log").read_text()
    for hidden in (secret, PASSWORD, token):
        assert hidden not in text
    lines = text.splitlines()
    assert all(line[:4] == "2026" or line[:2] == "20" or line.startswith("    | ") for line in lines), lines
    assert all(char.isprintable() for line in lines for char in line)
    assert len(text) < 100_000
    assert "user=root" not in [line.split()[-1] for line in lines if "signed in" in line]


def test_no_secret_is_visible(site, proxy):
    made = proxy.login("alice", PASSWORD, ADDRESS)
    pid = site.processes["manager"].pid
    shown = b""
    for name in ("cmdline", "environ"):
        with open(f"/proc/{pid}/{name}", "rb") as file:
            shown += file.read()
    stored = b"".join(path.read_bytes() for path in (site.base / "state").glob("dispatcher.db*"))
    for hidden in (made["token"], made["device"], PASSWORD):
        assert hidden.encode() not in shown
        assert hidden.encode() not in stored
    assert made["session"]["sha256"].encode() in stored


ESCALATIONS = [
    ("POST", "/agents", {"name": "mallory", "password": "x" * 8}),
    ("DELETE", "/agents/alice", None),
    ("PUT", "/agents/alice/state", {"state": "stopped"}),
    ("PUT", "/agents/alice/password", {"password": "x" * 8}),
    ("PUT", "/agents/alice/reset_data", None),
    ("GET", "/agents/alice/logs", None),
    ("GET", "/sessions", None),
    ("DELETE", "/sessions?user=alice", None),
    ("POST", "/reload", None),
    ("GET", "/stats/top", None),
]


def test_the_proxys_role_cannot_do_what_the_administrators_can(site):
    connection = UnixConnection(site.base / "run/proxy.sock")
    for method, path, body in ESCALATIONS:
        headers = {"Content-Type": "application/json"} if body else {}
        connection.request(method, path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        answer.read()
        assert answer.status in {404, 405}, (method, path)
    connection.close()
    assert [row["name"] for row in site.admin("GET", "/agents").json()["agents"]] == ["alice"]
    assert site.admin("POST", "/agents/alice/authenticate", {"password": PASSWORD}).status == 200


def test_one_user_cannot_act_on_anothers_agent_or_session(site, proxy):
    site.add("bob")
    alices = proxy.login("alice", PASSWORD, ADDRESS)["session"]["sha256"]
    bobs = proxy.login("bob", PASSWORD, ADDRESS)["session"]["sha256"]
    for act in (
        lambda: proxy.my_state(bobs, "alice", "stopped"),
        lambda: proxy.select(bobs, "alice"),
        lambda: proxy.logout(bobs, alices[:16]),
    ):
        with pytest.raises(NotFound):
            act()
    with pytest.raises(Forbidden):
        proxy.handover(bobs, f"{site_label(site, 'alice')}.example.org", "0" * 64)
    assert proxy.lookup(alices)["agent"] == "alice"
    assert [agent["name"] for agent in proxy.my_agents(bobs)["agents"]] == ["bob"]
    for extra in ({"image": "x"}, {"command": ["sh"]}, {"admin": True}, {"mounts": ["/"]}, {"user": "alice"}):
        answer = raw_post(site, "/sessions/state", {"sha256": bobs, "agent": "bob", "state": "running"} | extra)
        assert answer == 400


def site_label(site, agent):
    from dispatcher.plugin import names

    return names.key(agent)


def raw_post(site, path, body):
    connection = UnixConnection(site.base / "run/proxy.sock")
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.root
def test_files_of_the_manager_are_closed_to_others(site):
    state = site.base / "state"
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)
        open_to_me = 0
        for path in ("dispatcher.db", "secrets", "manager.lock"):
            try:
                os.close(os.open(state / path, os.O_RDONLY))
                open_to_me += 1
            except OSError:
                pass
        try:
            os.listdir(state)
            open_to_me += 1
        except OSError:
            pass
        os._exit(open_to_me)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
