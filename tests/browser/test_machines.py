"""A virtual machine as a person meets it: its boot watched, used, put to sleep on disk when idle, awake as it was."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import expect

from tests.support import vm
from tests.support.installation import until

pytestmark = [
    pytest.mark.browser,
    pytest.mark.libvirt,
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.xdist_group("machines"),
]

APPS = """
[apps.machine]
title = "A machine of my own"
provider = "libvirt"
start_timeout = "4m"
stop_grace = "5s"
idle_timeout = "4s"
idle_action = "hibernate"
[apps.machine.libvirt]
OPTIONS
"""

#: Tells the test every stage and detail that the waiting page shows, as the page shows it.
WATCH = """
addEventListener("DOMContentLoaded", () => {
  const list = document.querySelector("[data-stages]");
  if (!list) return;
  const tell = () => saw(performance.timeOrigin, [...list.querySelectorAll("[data-stage], small")].map((e) => e.textContent));
  new MutationObserver(tell).observe(list, { childList: true, subtree: true, characterData: true });
  tell();
});
"""


def apps() -> str:
    options = vm.app_options(initrd=str(vm.images() / "initrd.img"))
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in options.items())
    return APPS.replace("OPTIONS", text)


def test_a_machine_is_booted_used_saved_when_idle_and_woken_as_it_was(site_with, person) -> None:
    site = site_with(apps(), people=("alice",), proxy='hold = "300ms"')
    page = person()
    pages: dict[float, list[str]] = {}
    page.expose_function("saw", lambda page, shown: pages.setdefault(page, []).extend(shown))
    page.add_init_script(WATCH)

    site.sign_in(page, "alice")
    expect(page.get_by_role("heading", name="A machine of my own")).to_be_visible()
    expect(page.get_by_role("heading", name="A machine for alice")).to_be_visible(timeout=240_000)
    ((_, shown),) = pages.items()  # one page, never reloaded, showed
    order = [shown.index(stage) for stage in ("booting", "the machine starts", "waiting for the app")]
    assert order == sorted(order), shown
    # What the guest itself says, of which a quick one's may be over before it is seen.
    assert {"mounting the disks", "bringing up the network", "starting the app"} & set(shown), shown

    up = page.locator("#up")
    before = up.inner_text()
    expect(up).not_to_have_text(before)  # over a WebSocket
    for count in ("1", "2", "3"):
        page.get_by_role("button", name="Count").click()
        expect(page.locator("#count")).to_have_text(count)

    name = site.admin("GET", "/agents/alice/runtime").json()["handle"]["name"]
    assert vm.qemus(name)
    page.goto("about:blank")
    until(
        "it is saved by itself",
        lambda: site.admin("GET", "/agents/alice/state").json()["state"] == "hibernated",
        120,
    )
    assert "Managed save:   yes" in vm.virsh("dominfo", name)
    assert vm.qemus(name) == []

    page.goto(site.url)
    expect(page.get_by_role("heading", name="A machine for alice")).to_be_visible(timeout=120_000)
    expect(page.locator("#count")).to_have_text("3")
    kinds = [event["kind"] for event in site.admin("GET", "/agents/alice/events").json()["events"]]
    assert kinds[kinds.index("hibernated") :] == ["hibernated", "resumed"], kinds
    page.get_by_role("button", name="Count").click()
    expect(page.locator("#count")).to_have_text("4")
    expect(up).not_to_have_text(up.inner_text())
