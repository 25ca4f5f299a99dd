"""200 sign-ins at once through the whole product: a bounded queue, honest refusals, everybody else served."""

from __future__ import annotations

import concurrent.futures
import re
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.support.installation import PASSWORD, Installation

pytestmark = pytest.mark.slow


@pytest.fixture
def site(short_tmp):
    with Installation(short_tmp) as site:
        site.start("manager")
        site.start("proxy")
        for name in ("alice", "bob"):
            site.add(name)
        yield site


def memory(site) -> int:
    """Memory of both daemons and their children in KiB, agents left out."""
    total = 0
    for what in ("manager", "proxy"):
        parent = psutil.Process(site.processes[what].pid)
        for process in [parent, *(parent.children(recursive=True) if what == "proxy" else [])]:
            total += int(re.search(r"Pss:\s+(\d+)", Path(f"/proc/{process.pid}/smaps_rollup").read_text())[1])
    return total


def test_two_hundred_sign_ins_at_once(site) -> None:
    cookie = site.login("alice")
    site.app(cookie)
    before = memory(site)
    done = threading.Event()
    waits: list[float] = []
    peak = [before]

    def others() -> None:
        while not done.is_set():
            begun = time.monotonic()
            page = site.web("GET", "/auth/login", Accept="text/html").status
            app = site.web("GET", "/count", Cookie=cookie).status
            status = site.web("GET", "/auth/status", Accept="application/json", Cookie=cookie).status
            waits.append(time.monotonic() - begun if (page, app, status) == (200, 200, 200) else 1e9)
            peak[0] = max(peak[0], memory(site))
            time.sleep(0.05)

    def sign_in(number: int):
        name = "alice" if number % 2 else "bob"
        return site.web("POST", "/auth/login", {"user": name, "password": PASSWORD}, Accept="application/json")

    watcher = threading.Thread(target=others)
    watcher.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(sign_in, range(200)))
    finally:
        done.set()
        watcher.join()
    refused = [answer for answer in answers if answer.status == 429]
    assert {answer.status for answer in answers} <= {200, 429}, next(
        answer.body for answer in answers if answer.status not in {200, 429}
    )
    assert len(answers) - len(refused) >= 20, "a queue, not a wall"
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert all(answer.json()["code"] == "too-many-requests" for answer in refused)
    assert len(waits) >= 5
    assert sorted(waits)[len(waits) // 2] < 2.0
    assert max(waits) < 15.0
    # argon2id takes its memory once per check at the same time, not once per visitor.
    assert peak[0] - before < 120 * 1024
    assert sign_in(0).status == 200
