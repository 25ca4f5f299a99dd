"""`kill -9` of the manager and of the proxy: people go on working, the same processes are adopted."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.installation import Installation, until

NAMES = [f"user{number}" for number in range(5)]


@pytest.fixture
def site(short_tmp):
    with Installation(short_tmp) as installation:
        installation.start("manager")
        installation.start("proxy")
        for name in NAMES:
            installation.add(name)
        yield installation


def test_agents_are_served_while_the_manager_is_dead_and_adopted_afterwards(site):
    cookies = {name: site.login(name) for name in NAMES}
    before = {name: site.app(cookie)["pid"] for name, cookie in cookies.items()}
    hosts = {name: site.admin("GET", f"/agents/{name}/runtime").json()["handle"] for name in NAMES}
    site.kill("manager")
    for name, cookie in cookies.items():
        assert site.web("GET", "/", Cookie=cookie).json()["pid"] == before[name]
    site.start("manager")
    until(
        "every agent is running again",
        lambda: all(row["state"] == "running" for row in site.admin("GET", "/agents").json()["agents"]),
    )
    assert {name: site.app(cookie)["pid"] for name, cookie in cookies.items()} == before
    assert {name: site.admin("GET", f"/agents/{name}/runtime").json()["handle"] for name in NAMES} == hosts


def test_no_request_is_lost_over_restarts_of_the_manager(site):
    cookie = site.login(NAMES[0])
    site.app(cookie)
    stop, statuses = threading.Event(), []

    def visit():
        while not stop.is_set():
            statuses.append(site.web("GET", "/count", Cookie=cookie).status)
            time.sleep(0.01)

    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        for _ in range(3):
            site.kill("manager")
            time.sleep(0.3)
            site.start("manager")
            time.sleep(0.3)
    finally:
        stop.set()
        visitor.join()
    assert len(statuses) > 50
    assert set(statuses) == {200}


def test_the_first_request_after_a_killed_proxy_works_with_the_same_cookie(site):
    cookie = site.login(NAMES[1])
    pid = site.app(cookie)["pid"]
    site.kill("proxy")
    site.start("proxy")
    answer = site.web("GET", "/", Cookie=cookie)
    assert answer.status == 200
    assert answer.json()["pid"] == pid


def test_nobody_new_gets_in_while_the_manager_is_dead_and_everybody_afterwards(site):
    site.kill("manager")
    answer = site.web(
        "POST",
        "/auth/login",
        {"name": NAMES[0], "password": "correct horse battery"},
        Accept="application/json",
        Origin=f"http://127.0.0.1:{site.port}",
    )
    assert answer.status == 503
    assert "fix" in answer.json()
    site.start("manager")
    assert site.app(site.login(NAMES[0]))["pid"]


def test_a_killed_agent_is_reported_at_once_and_restarts(site):
    cookie = site.login(NAMES[2])
    pid = site.app(cookie)["pid"]
    site.web("GET", "/exit", Cookie=cookie)
    begin = time.monotonic()
    first = site.web("GET", "/", Cookie=cookie, Accept="text/html", Sec_Fetch_Mode="navigate")
    assert first.status in {200, 503}
    assert time.monotonic() - begin < 6
    if first.status == 503:
        assert first.headers["Retry-After"]
        assert "no-store" in first.headers["Cache-Control"]
        assert first.headers["Content-Type"].startswith("text/html")
    assert site.app(cookie)["count"] == 0
    assert pid


def test_a_leftover_of_a_crash_does_not_stop_the_next_start(site):
    site.kill("manager")
    assert (site.base / "run/manager.sock").exists()
    site.start("manager")
    site.kill("proxy")
    site.start("proxy")


def test_a_second_manager_is_refused(site):
    import subprocess
    import sys

    second = subprocess.run(
        [sys.executable, "-m", "dispatcher", "--config", str(site.config), "manager"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert second.returncode == 4 or second.returncode == 1
    assert "Traceback" not in second.stderr
    assert site.admin("GET", "/healthz").status == 200
