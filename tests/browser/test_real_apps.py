"""Real applications behind the dispatcher, from the examples as they are published, driven by a person's clicks."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import example, until_the_kernel_is_idle
from tests.support.installation import until

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_a_notebook_cell_runs_in_jupyterlab(site_with, person, real_apps) -> None:
    site = site_with(example("jupyterlab.toml", real_apps), people=("alice",))
    page = person(viewport={"width": 1400, "height": 900})
    sockets = []
    page.on("websocket", lambda socket: sockets.append(socket.url))
    site.sign_in(page, "alice")
    page.locator(".jp-LauncherCard[data-category=Notebook]").first.click(timeout=60_000)
    until_the_kernel_is_idle(page)
    cell = page.locator(".jp-Notebook .jp-CodeCell .cm-content").first
    cell.click()
    page.keyboard.insert_text(
        "import os; answer = 6 * 7; print(answer, os.environ['DISPATCHER_USER'], os.getuid() > 0)"
    )
    page.keyboard.press("Shift+Enter")
    expect(page.locator(".jp-OutputArea-output").first).to_contain_text("42 alice True", timeout=60_000)
    # Asleep, its memory kept: the next thing that the person does wakes it, and nothing is lost.
    until(
        "it sleeps", lambda: site.admin("PUT", "/agents/alice/state?wait=20", {"state": "suspended"}).status == 200
    )
    page.keyboard.insert_text("print('again', answer + 1)")
    page.keyboard.press("Shift+Enter")
    expect(page.locator(".jp-OutputArea-output").nth(1)).to_contain_text("again 43", timeout=60_000)
    assert site.admin("GET", "/agents/alice/state").json()["state"] == "running"
    assert any("/api/kernels/" in url and "/channels" in url for url in sockets)
    page.keyboard.press("Control+s")
    page.wait_for_timeout(1000)
    assert [path.name for path in site.data("alice").glob("*.ipynb")] == ["Untitled.ipynb"]


def test_a_reactive_notebook_runs_in_marimo(site_with, person, real_apps) -> None:
    """An app that listens on a TCP port, in a private network."""
    site = site_with(example("marimo.toml", real_apps), people=("alice",))
    page = person(viewport={"width": 1400, "height": 900})
    sockets = []
    page.on("websocket", lambda socket: sockets.append(socket.url))
    site.sign_in(page, "alice")
    with page.context.expect_page() as opened:
        page.get_by_text("Create a new notebook").first.click(timeout=60_000)
    notebook = opened.value
    notebook.on("websocket", lambda socket: sockets.append(socket.url))
    cell = notebook.locator(".cm-content").first
    cell.click(timeout=60_000)
    notebook.keyboard.insert_text("import os; f'{6 * 7} {os.environ[\"DISPATCHER_USER\"]}'")
    notebook.keyboard.press("Control+Enter")
    expect(notebook.get_by_text("42 alice").first).to_be_visible(timeout=60_000)
    assert any("/ws" in url for url in sockets)
