"""A machine without a clock of its own: after a boot the time is behind what was stored, until NTP sets it."""

import sqlite3
import tempfile
from pathlib import Path

import pytest

from tests.support.installation import PASSWORD, Installation, until

pytestmark = [pytest.mark.root, pytest.mark.bubblewrap]
DAYS = 400 * 86400


@pytest.fixture
def site():
    base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    base.chmod(0o755)
    with Installation(base) as made:
        made.start("manager")
        made.start("proxy")
        made.add("alice")
        yield made


def sign_in(site, password):
    body = {"user": "alice", "password": password}
    origin = f"http://127.0.0.1:{site.port}"
    return site.web("POST", "/auth/login", body, Accept="application/json", Origin=origin)


def test_nobody_waits_for_the_clock_and_no_session_lives_for_as_long(site):
    cookie = site.login("alice")
    until("alice is throttled", lambda: sign_in(site, "a wrong password").status == 429)
    site.processes["manager"].terminate()
    site.processes["manager"].wait(20)
    with sqlite3.connect(site.base / "state/dispatcher.db") as database:  # as if the next boot were long before
        database.execute("UPDATE throttle SET last = last + ?, until = until + ?", (DAYS, DAYS))
        database.execute("UPDATE sessions SET created = created + ?, last_used = last_used + ?", (DAYS, DAYS))
    database.close()
    site.start("manager")
    until("alice signs in", lambda: sign_in(site, PASSWORD).status == 200, 60)
    assert site.web("GET", "/auth/status", Cookie=cookie, Accept="application/json").status == 200
    with sqlite3.connect(site.base / "state/dispatcher.db") as database:
        (latest,) = database.execute("SELECT max(created) FROM sessions").fetchone()
        (now,) = database.execute("SELECT unixepoch('now')").fetchone()
    database.close()
    assert latest < now + 5
