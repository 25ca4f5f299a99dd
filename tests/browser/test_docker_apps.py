"""JupyterLab in a container, signed in by a real browser: a cell, sleep when idle, awake with its variables."""

from __future__ import annotations

import subprocess

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import ROOT, until_the_kernel_is_idle
from tests.support.docker_tools import docker
from tests.support.installation import until

pytestmark = [pytest.mark.browser, pytest.mark.docker, pytest.mark.root, pytest.mark.slow]


def test_a_notebook_cell_runs_in_a_container_that_sleeps_when_idle(site_with, person) -> None:
    subprocess.run([ROOT / "tests/machine/build-images", "jupyter"], check=True, timeout=280)
    text = (ROOT / "examples/docker-jupyterlab.toml").read_text(encoding="utf-8")
    built = 'build = "/opt/apps/docker-jupyterlab"'
    assert built in text
    text = text.replace(built, 'image = "dispatcher-test/jupyter"')
    # Longer than a kernel's start on a busy machine, during which nobody says anything; later it is to fall asleep soon.
    text = text.replace('busy_grace = "12h"', 'idle_timeout = "10m"')
    site = site_with(text.replace("{", "{{").replace("}", "}}"), people=("alice",))
    page = person(viewport={"width": 1400, "height": 900})
    site.sign_in(page, "alice")
    page.locator(".jp-LauncherCard[data-category=Notebook]").first.click(timeout=90_000)
    until_the_kernel_is_idle(page)
    cell = page.locator(".jp-Notebook .jp-CodeCell .cm-content").first
    cell.click()
    page.keyboard.insert_text(
        "import os; answer = 6 * 7; print(answer, os.environ['DISPATCHER_USER'], os.getuid() > 0)"
    )
    page.keyboard.press("Shift+Enter")
    expect(page.locator(".jp-OutputArea-output").first).to_contain_text("42 alice True", timeout=90_000)

    site.config.write_text(site.config.read_text().replace('idle_timeout = "10m"', 'idle_timeout = "5s"'))
    assert site.admin("POST", "/reload").status == 200
    name = docker("ps", "--format", "{{.Names}}", "--filter", "label=dispatcher.agent=alice")
    until(
        "it sleeps by itself", lambda: site.admin("GET", "/agents/alice/state").json()["state"] == "suspended", 120
    )
    assert docker("inspect", "--format", "{{.State.Status}}", name) == "paused"

    # Its polls were refused while it slept, of which JupyterLab tells in a dialog: a person closes it and goes on.
    page.wait_for_timeout(500)
    for _ in range(5):
        if not page.locator(".jp-Dialog button").count():
            break
        page.locator(".jp-Dialog button").last.click()
        page.wait_for_timeout(500)
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").nth(1).click()
    page.keyboard.insert_text("print('again', answer + 1)")
    page.keyboard.press("Shift+Enter")
    expect(page.locator(".jp-OutputArea-output").nth(1)).to_contain_text("again 43", timeout=60_000)
    page.keyboard.press("Control+s")
    until("the notebook is saved", lambda: list(site.data("alice").glob("*.ipynb")))
