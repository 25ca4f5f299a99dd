"""What people see while an app is not there yet, or will not come."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

import dispatcher
from tests.support.installation import until

pytestmark = pytest.mark.browser

SLOW = """
[apps.slow]
title = "Slow app"
start_timeout = "60s"
[apps.slow.subprocess]
command = ["/bin/sh", "-c", "sleep 3; exec \\"$0\\" -m dispatcher.demo --unix \\"$1\\"", "{python}", "{{socket}}"]
"""

#: Fails until its data directory holds a file called `ready`.
BROKEN = """
[defaults]
max_restarts = 0
[apps.broken]
title = "Broken app"
[apps.broken.subprocess]
command = ["/bin/sh", "-c", "[ -e ready ] || {{ echo 'loading <settings>'; echo 'no such table: people' >&2; exit 3; }}; exec \\"$0\\" -m dispatcher.demo --unix \\"$1\\"", "{python}", "{{socket}}"]
"""


@pytest.fixture(scope="module", params=["scripts", "no scripts"])
def scripts(request) -> bool:
    return request.param == "scripts"


def apps(text: str) -> str:
    """The interpreter must be visible in the sandbox although the command is a shell."""
    shown = sorted(
        {
            str(Path(sys.prefix)),
            str(Path(sys.executable).resolve().parent.parent),
            str(Path(dispatcher.__file__).parent),
        }
    )
    shown = [path for path in shown if not path.startswith("/usr")]
    return text.rstrip() + f"\nread_only = {shown}\n".replace("'", '"')


def test_a_slow_start_is_followed_to_its_end(site_with, person, scripts: bool) -> None:
    site = site_with(apps(SLOW), people=("alice",), proxy='hold = "300ms"')
    page = person(java_script_enabled=scripts)
    statuses = []
    page.on("response", lambda answer: statuses.append((answer.status, answer.url, answer.headers)))
    site.sign_in(page, "alice", "/?view=all")
    expect(page.get_by_role("heading", name="Slow app")).to_be_visible()
    expect(page.get_by_text("This page opens the app as soon as it is ready")).to_be_visible()
    assert page.url == f"{site.url}/?view=all"
    status, _, headers = next(each for each in statuses if each[1] == page.url and each[0] != 303)
    assert (status, headers["cache-control"], headers["retry-after"]) == (503, "no-store", "2")
    assert page.locator(".stages .now").inner_text().strip()
    begun = time.monotonic()
    expect(page.get_by_role("heading", name="Notebook")).to_be_visible(timeout=15_000)
    assert page.url == f"{site.url}/?view=all"
    assert time.monotonic() - begun < 8
    if scripts:
        waited = [url for status, url, _ in statuses if status == 503]
        assert len(waited) == 1, "the page was followed without a reload"
        assert any("/auth/events" in url for _, url, _ in statuses)


def test_opening_an_app_from_the_list_is_not_cancelled_by_the_lists_own_reload(site_with, person) -> None:
    """The list reloads when a state changes, which cancelled a navigation that was held for a slow start."""
    slower = SLOW.replace("sleep 3", "sleep 8")
    site = site_with(apps(slower), people=("alice",), proxy='hold = "30s"')
    page = person()
    site.sign_in(page, "alice", "/auth/")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("[data-agent=alice]")).to_contain_text("Stopped", timeout=15_000)
    page.get_by_role("button", name="Open").or_(page.get_by_role("link", name="Open")).first.click(
        no_wait_after=True
    )
    expect(page.get_by_role("heading", name="Notebook")).to_be_visible(timeout=25_000)


def test_a_failed_start_is_said_and_can_be_tried_again(site_with, person, scripts: bool) -> None:
    site = site_with(apps(BROKEN), people=("alice",), proxy='hold = "300ms"')
    page = person(java_script_enabled=scripts)
    site.sign_in(page, "alice", "/?view=all")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    text = page.locator("main").inner_text()
    assert "Broken app could not start" in text
    assert "tell your administrator (request ID " in text
    assert "people" not in text and "exit code" not in text.lower(), "that is for operators"
    page.goto(f"{site.url}/auth/")
    expect(page.locator("[data-agent=alice]")).to_contain_text("Failed")
    page.goto(f"{site.url}/?view=all")
    data = until(
        "the data directory is there", lambda: site.data("alice") if site.data("alice").is_dir() else None
    )
    (data / "ready").touch()
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("heading", name="Notebook")).to_be_visible(timeout=15_000)
    assert page.url == f"{site.url}/?view=all"


@pytest.mark.root
def test_a_killed_app_comes_back_while_one_looks(demo, person) -> None:
    page = person()
    demo.sign_in(page, "alice")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice")
    pids = demo.pids("alice")
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    page.goto(demo.url)
    expect(page.get_by_role("heading", level=1)).to_contain_text("Notebook of alice", timeout=10_000)
    assert time.monotonic() - begun < 5
    assert not set(pids) & set(demo.pids("alice"))
