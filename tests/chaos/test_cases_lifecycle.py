"""What people reported of comparable systems: restarts, deaths, late and looping apps, idleness, through the real daemons."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.support.cases_site import Site, app, frame
from tests.support.installation import PASSWORD, until

pytestmark = pytest.mark.bubblewrap
HTML = {"Accept": "text/html", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}


@pytest.fixture(scope="module")
def site():
    with Site() as site:
        yield site


@pytest.fixture
def user(site, request):
    """Someone who is signed in and whose app is up: name and cookie."""
    name = f"user{abs(hash(request.node.name)) % 10**8}"
    site.add(name)
    cookie = site.login(name)
    site.app(cookie)
    yield name, cookie
    site.admin("DELETE", f"/agents/{name}?wait=30")


def handles(site):
    names = [row["name"] for row in site.admin("GET", "/agents").json()["agents"]]
    runtimes = {name: site.admin("GET", f"/agents/{name}/runtime").json() for name in names}
    return {name: (json.dumps(each["handle"]), each["started_at"]) for name, each in runtimes.items()}


def test_fifty_start_at_once_and_live_through_a_restart_of_the_manager_without_a_lost_request():
    names = [f"user{number}" for number in range(50)]
    with Site(app("web", 'start_timeout = "3m"'), extra="[auth]\nhash_queue = 200") as site:
        for name in names:
            site.add(name)
        with ThreadPoolExecutor(50) as pool:
            started = list(pool.map(lambda name: site.put(name, "running", 60).status, names))
        assert set(started) <= {200, 202}
        for name in names:
            site.reach(name, "running", 120)
        with ThreadPoolExecutor(4) as pool:
            cookies = dict(zip(names, pool.map(site.login, names), strict=True))
        before = handles(site)
        uids = {site.app(cookie)["uid"] for cookie in cookies.values()}
        assert len(uids) == (50 if os.geteuid() == 0 else 1)
        stop, statuses, others = threading.Event(), [], []

        def visit(share):
            while not stop.is_set():
                for name in share:
                    answer = site.web("GET", "/", Cookie=cookies[name])
                    statuses.append(answer.status)
                    if answer.status == 200 and ["X-Dispatcher-User", name] not in answer.json()["headers"]:
                        others.append(answer.json())

        visitors = [threading.Thread(target=visit, args=(names[at::2],)) for at in range(2)]
        for visitor in visitors:
            visitor.start()
        try:
            for how in (signal.SIGKILL, signal.SIGTERM):
                process = site.processes["manager"]
                process.send_signal(how)
                process.wait(30)
                time.sleep(0.5)
                site.start("manager")
                until(
                    "all are adopted",
                    lambda: all(
                        row["state"] == "running" for row in site.admin("GET", "/agents").json()["agents"]
                    ),
                )
        finally:
            stop.set()
            for visitor in visitors:
                visitor.join()
        assert len(statuses) > 100
        assert set(statuses) == {200}
        assert not others, "an answer of somebody else's app"
        assert handles(site) == before, "the same processes"


def test_a_busy_app_that_answers_no_health_check_during_a_restart_is_kept(site, user):
    name, cookie = user
    before = handles(site)[name]
    site.web("GET", "/deaf/4", Cookie=cookie)
    with suppress(OSError):
        site.kill("manager")
    site.start("manager")
    time.sleep(3)  # three rounds of the reconciler
    site.reach(name, "running")
    assert handles(site)[name] == before
    assert site.app(cookie)


def test_leftovers_of_a_crash_are_reported_and_do_not_prevent_a_start(site, user):
    name, cookie = user
    before = handles(site)[name]
    log = len(site.log("manager"))
    site.kill("manager")
    site.kill("proxy")
    for path in ("manager.sock", "proxy.sock", "feed.sock"):
        assert (site.base / "run" / path).exists(), "it is left over"
    assert (site.base / "state/manager.lock").read_text()
    site.start("manager")
    site.start("proxy")
    assert handles(site)[name] == before
    assert site.web("GET", "/", Cookie=cookie).status == 200
    assert "did not stop cleanly" in site.log("manager")[log:]
    log = len(site.log("manager"))
    site.processes["manager"].terminate()
    site.processes["manager"].wait(20)
    site.start("manager")
    assert "did not stop cleanly" not in site.log("manager")[log:]


def test_stops_and_starts_at_once_end_with_the_last_command_and_show_no_error(site, user):
    name, cookie = user
    stop, answers = threading.Event(), []

    def visit():
        while not stop.is_set():
            answers.append(site.web("GET", "/", Cookie=cookie, **HTML))

    def wish(number):
        return site.put(name, "running" if number % 2 else "stopped").status

    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(wish, range(40))) <= {200, 202}
    finally:
        stop.set()
        visitor.join()
    assert {answer.status for answer in answers} <= {200, 503}
    for answer in answers:
        if answer.status == 503:
            assert answer.headers["Retry-After"]
            assert answer.headers["Content-Type"].startswith("text/html")
    site.put(name, "running")
    site.put(name, "stopped")
    site.reach(name, "stopped")
    time.sleep(2)
    assert site.state(name)["state"] == "stopped"
    site.put(name, "stopped")
    site.put(name, "running")
    site.reach(name, "running")


LATE = app("late", "environment = {CASE_READY_AFTER = '6'}")
NEVER = app("never", "environment = {CASE_READY_AFTER = '1000'}", 'start_timeout = "3s"', "max_restarts = 0")
LOOP = app("loop", "environment = {CASE_LAST_WORDS = 'no cheese is left <b>'}", "max_restarts = 2")
SLOW = app("slow", "environment = {CASE_SLOW_START = '30'}")


def test_late_looping_and_never_ready_apps():
    """Nobody's request comes before the health check passes; what fails says why, and leads nobody in circles."""
    with Site(LATE + NEVER + LOOP + SLOW, extra='default_app = "late"', proxy='hold = "500ms"') as site:
        for name in ("late", "never", "loop", "slow"):
            site.add(f"{name}person", name)
        cookies = {"late": site.login("lateperson")}

        # Not ready yet: a page for people, a document for programs, neither to be kept.
        page = site.web("GET", "/first?x=1", Cookie=cookies["late"], **HTML)
        assert page.status == 503
        assert page.headers["Retry-After"]
        assert "no-store" in page.headers["Cache-Control"]
        assert page.headers["Content-Type"].startswith("text/html")
        document = site.web("GET", "/first", Cookie=cookies["late"], Accept="application/json")
        assert document.status == 503
        assert document.headers["Retry-After"]
        assert "no-store" in document.headers["Cache-Control"]
        assert document.headers["Content-Type"] == "application/problem+json"
        assert document.json()["agent"]["state"] == "starting"
        site.app(cookies["late"])
        assert site.app(cookies["late"], "/seen")["early"] == []

        for name in ("never", "loop", "slow"):
            cookies[name] = site.login(f"{name}person")
        # A slow start is cancelled, and nothing of it is left.
        assert site.state("slowperson")["state"] == "starting"
        assert site.put("slowperson", "stopped", 20).status == 200
        assert site.state("slowperson")["state"] == "stopped"

        # It ends right after each start: gave up with its last words, and no redirect.
        until("it is given up", lambda: b"gave up" in site.admin("GET", "/agents/loopperson/why").body, 60)
        page = site.web("GET", "/", Cookie=cookies["loop"], **HTML)
        assert page.status == 503
        assert page.headers["Location"] is None
        assert b"cheese" not in page.body  # the reason is for operators
        assert b"no cheese is left <b>" in site.admin("GET", "/agents/loopperson/why").body
        document = site.web("GET", "/", Cookie=cookies["loop"], Accept="application/json")
        assert document.status == 503
        assert document.json()["agent"]["state"] == "failed"
        kinds = [
            event["kind"] for event in site.admin("GET", "/agents/loopperson/events?limit=100").json()["events"]
        ]
        assert kinds.count("starting") == 3, kinds

        # It never gets healthy: a time-out with the reason.
        site.reach("neverperson", "failed", 60)
        failure = site.state("neverperson")["failure"]
        assert "503" in json.dumps(failure)
        assert failure["fix"]
        page = site.web("GET", "/", Cookie=cookies["never"], **HTML)
        assert page.status == 503
        assert b"Try again" in page.body


@pytest.mark.slow
def test_streams_and_typing_keep_an_app_and_open_tabs_do_not():
    people = ("stream", "typing", "pings", "polls")
    with Site(app("web", 'idle_timeout = "12s"')) as site:
        for name in people:
            site.add(name)
        cookies = {name: site.login(name) for name in people}
        for cookie in cookies.values():
            site.app(cookie)
        stream = site.open("/sse?600", cookies["stream"])  # 3 KB a second
        typing, _ = site.upgrade("/ws", cookies["typing"])
        pings, _ = site.upgrade("/ws", cookies["pings"])
        before = {name: each[1] for name, each in handles(site).items()}
        begin, slept, tick = time.monotonic(), {}, 0
        while (past := time.monotonic() - begin) < 24 or (len(slept) < 2 and past < 90):
            tick += 1
            if tick % 9 in {0, 1, 4}:  # not at even pauses, as heartbeats are
                typing.sendall(frame(b"a"))
                assert typing.recv(10) == b"\x81\x01a"
            if tick % 2 == 0:
                pings.sendall(frame(b"", 9))
            site.web("GET", f"/api/status?_={tick + 1700000000}", Cookie=cookies["polls"], Sec_Fetch_Mode="cors")
            stream.recv(65536)
            for name in people:
                if site.state(name)["state"] == "suspended":
                    slept.setdefault(name, tick)
            time.sleep(0.4)
        assert set(slept) == {"pings", "polls"}
        assert {name: each[1] for name, each in handles(site).items()} == before
        assert site.state("polls")["state"] == "suspended", "polls do not wake it"
        assert site.web("GET", "/", Cookie=cookies["polls"], **HTML).status == 200, "a person does"
        for sock in (stream, typing, pings):
            sock.close()


def test_old_tabs_polling_a_stopped_app_are_refused_cheaply_and_wake_nothing(site, user):
    name, cookie = user
    for number in range(4):
        site.web("GET", f"/api/kernels?{number + 1700000000000}", Cookie=cookie, Sec_Fetch_Mode="cors")
    assert site.put(name, "stopped", 20).status == 200
    process = site.workers()[-1]
    began, busy = time.monotonic(), sum(process.cpu_times()[:2])
    statuses = []
    for number in range(60):
        target = f"/api/kernels?{number + 1700000000100}"
        statuses.append(site.web("GET", target, Cookie=cookie, Sec_Fetch_Mode="cors").status)
        time.sleep(0.05)
    assert set(statuses) == {503}
    assert time.monotonic() - began < 20, "none was held"
    assert sum(process.cpu_times()[:2]) - busy < 1.5
    assert site.state(name)["state"] == "stopped"


def test_agents_of_a_removed_app_can_be_stopped_and_removed_and_others_continue():
    with Site(app("old") + app("web", 'idle_timeout = "6s"'), extra='default_app = "web"') as site:
        site.add("alice")
        site.add("bob", "old")
        site.add("carol", "old")
        for name in ("alice", "bob", "carol"):
            site.app(site.login(name))
        text = site.config.read_text()
        site.config.write_text(text[: text.index("[apps.old]")] + text[text.index("[apps.web]") :])
        site.kill("manager")
        site.start("manager")
        for name in ("bob", "carol"):
            assert site.state(name)["state"] == "running", "it is known and served"
        assert site.put("bob", "stopped", 20).status == 200
        assert site.admin("DELETE", "/agents/carol?wait=20").status == 204
        refused = site.put("bob", "running", 10)
        assert refused.status >= 400
        assert "old" in refused.body.decode()
        site.reach("alice", "suspended")  # the reaper goes on
        assert site.admin("DELETE", "/agents/bob?wait=20").status == 204


def test_a_user_removed_during_a_start_leaves_nothing(site):
    site.add("gone")
    cookie = site.login("gone")
    assert site.admin("DELETE", "/agents/gone?wait=20").status == 204
    assert site.web("GET", "/", Cookie=cookie).status == 401
    assert site.admin("GET", "/agents/gone").status == 404
    assert "gone" not in json.dumps(site.admin("GET", "/agents").json())


#: Found by every Python of the site: the wall clock goes wrong by as many hours as a file says, and who asks it leaves
#: a trace.  The classes are no functions, so that one who keeps `time.time` as an attribute gets no method.
WRONG_CLOCK = """
import os, time
class Wrong:
    def __init__(self, real, unit):
        self.real, self.unit = real, unit
    def __call__(self):
        try:
            with open({hours!r}) as file:
                ahead = float(file.read()) * 3600 * self.unit
            open({seen!r} + "/" + str(os.getpid()), "w").close()
        except (OSError, ValueError):
            return self.real()
        return self.real() + type(self.real())(ahead)
time.time, time.time_ns = Wrong(time.time, 1), Wrong(time.time_ns, 10**9)
"""


def test_a_clock_jump_stops_no_agent_and_ends_no_session(short_tmp, monkeypatch):
    """Both daemons see the wall clock go two hours ahead and back; idle times and lifetimes are shorter than that."""
    hours, seen = short_tmp / "hours", short_tmp / "seen"
    seen.mkdir()
    seen.chmod(0o777)  # the proxy has a user of its own
    (short_tmp / "sitecustomize.py").write_text(WRONG_CLOCK.format(hours=str(hours), seen=str(seen)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(short_tmp), os.environ.get("PYTHONPATH")))))
    lifetimes = '[auth]\nsession_idle = "20m"\nsession_lifetime = "40m"\n'
    with Site(app("web", 'idle_timeout = "20m"'), extra=lifetimes) as site:
        site.add("alice")
        cookie = site.login("alice")
        site.app(cookie)
        sock, _ = site.upgrade("/ws", cookie)
        before = handles(site)

        def all_is_well():
            assert site.web("GET", "/", Cookie=cookie).status == 200
            assert site.web("GET", "/auth/status", Cookie=cookie, Accept="application/json").status == 200
            sock.sendall(frame(b"a"))
            assert sock.recv(10) == b"\x81\x01a"

        for jump in ("2", "-2"):
            hours.write_text(jump)
            time.sleep(2.5)  # two rounds of the reconciler
            all_is_well()
            site.kill("manager")
            site.start("manager")
            site.reach("alice", "running")
            all_is_well()
            assert site.login("alice")
        assert handles(site) == before
        sock.close()
        deceived = {int(path.name) for path in seen.iterdir()}
        assert site.processes["manager"].pid in deceived
        assert deceived & {process.pid for process in site.workers()}


def size_of(directory):
    return sum(path.lstat().st_size for path in directory.rglob("*"))


def test_output_is_bounded_while_the_manager_is_away(site, user):
    """64 MB rather than 10 GB, with 4 MB kept per agent: the bound does not depend on how much it is."""
    name, cookie = user
    site.web("GET", "/noise/64?1", Cookie=cookie)
    site.kill("manager")
    try:
        until("all is written", lambda: site.web("GET", "/quiet", Cookie=cookie).json()["done"], 60)
        reserved = sum(path.stat().st_size for path in (site.base / "state").glob("dispatcher.db*"))
        assert size_of(site.base / "state") - reserved + size_of(site.base / "run") < 12_000_000
    finally:
        site.start("manager")
    site.reach(name, "running")
    lines = until(
        "its last line is known", lambda: site.admin("GET", f"/agents/{name}/logs?tail=3").json()["lines"]
    )
    assert lines[-1] == "the last line"


def test_a_state_directory_that_cannot_be_written_is_one_clear_error_and_nothing_is_lost(site, user):
    """Root may write anywhere, so the database is hidden behind a directory that cannot be one."""
    name, cookie = user
    state = site.base / "state"
    site.kill("manager")
    shutil.move(state / "dispatcher.db", state / "kept")
    (state / "dispatcher.db").mkdir()
    try:
        with pytest.raises(AssertionError, match="manager ended with") as caught:
            site.start("manager")
        assert "Traceback" not in str(caught.value)
        assert "dispatcher.db" in str(caught.value)
        assert site.web("GET", "/", Cookie=cookie).status == 200, "people work on"
    finally:
        (state / "dispatcher.db").rmdir()
        shutil.move(state / "kept", state / "dispatcher.db")
        site.start("manager")
    site.reach(name, "running")
    assert site.login(name, PASSWORD)
