"""Once a sign-out is answered the cookie is dead: on every worker, for whoever kept it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest

from tests.support.cases_site import Site
from tests.support.edge_harness import TOKEN, Edge
from tests.support.installation import request
from tests.support.stopped import stopped

WORKERS = 4


def test_a_worker_says_that_it_knows_after_it_has_acted() -> None:
    with Edge() as edge:
        assert edge.feed.wait_for(lambda frame: frame["type"] == "hello")["sync"] is True
        edge.feed.remove(tokens=(TOKEN,))
        edge.feed._send({"type": "sync", "number": 7})
        edge.feed.wait_for(lambda frame: frame == {"type": "synced", "number": 7})
        assert edge.worker.context.tables.sessions == {}
        assert edge.get().status == 401


@pytest.fixture(scope="module")
def site():
    with Site(proxy=f"workers = {WORKERS}") as site:
        site.add("alice")
        yield site


def sign_out(site: Site, cookie: str) -> float:
    began = time.monotonic()
    assert site.post("/auth/logout", {}, cookie).status in {200, 204}
    return time.monotonic() - began


@pytest.mark.bubblewrap
def test_no_other_connection_is_served_after_the_answer(site) -> None:
    """With all workers busy, so that some hear of it late."""
    site.app(site.login("alice"))
    busy = site.login("alice")
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            site.web("GET", "/", Cookie=busy)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            cookie = site.login("alice")
            with contextlib.ExitStack() as stack:
                kept = [stack.enter_context(contextlib.closing(connection(site))) for _ in range(4 * WORKERS)]
                assert {request(each, "GET", "/", Cookie=cookie).status for each in kept} == {200}
                sign_out(site, cookie)
                assert {answer(each, cookie) for each in kept} <= {401, 0}
    finally:
        done.set()
        for thread in threads:
            thread.join(10)


@pytest.mark.bubblewrap
def test_a_worker_that_hangs_holds_nobody_up_for_long(site) -> None:
    hung = site.workers()[-1]
    cookie = site.login("alice")
    with stopped(hung.pid):
        assert sign_out(site, cookie) < 5
    # It may take a connection before it reads of the end; then it closes it.
    with contextlib.closing(connection(site)) as first:
        assert answer(first, cookie) in {401, 0}
    assert site.web("GET", "/", Cookie=cookie).status == 401


def connection(site: Site):
    import http.client

    return http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)


def answer(connection, cookie: str) -> int:
    """Return the status that a kept connection gets, 0 when it was closed."""
    try:
        return request(connection, "GET", "/", Cookie=cookie).status
    except OSError:
        return 0
