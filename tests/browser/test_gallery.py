"""The apps of examples/gallery as they are published: used in a browser, suspended, and woken by the next use.

Their installation takes minutes and gigabytes, so they run by `make gallery` only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.support.installation import until

pytestmark = [pytest.mark.browser, pytest.mark.gallery, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "examples/gallery"
HOME = ROOT / ".cache/gallery"
PYTHON = (
    "datasette gunicorn flask-socketio dash panel shiny uvicorn streamlit gradio tensorboard setuptools<81 websockify"
).split()
NODE = ("node-red", "code-server")
SLOW = 60_000  # milliseconds: several of them load megabytes


@pytest.fixture(scope="session")
def home() -> Path:
    """The programs of the gallery, installed once and kept in the clone's cache."""
    stamp = HOME / "installed"
    wanted = "\n".join([*PYTHON, *NODE])
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(HOME, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", HOME / "apps"], check=True)
        pip = [HOME / "apps/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PYTHON], check=True, timeout=1800)
        (HOME / "node").mkdir()
        command = ["npm", "install", "--no-fund", "--no-audit", "--silent", *NODE]
        # code-server compiles parts of itself, as root with this setting only.
        environment = os.environ | {"npm_config_unsafe_perm": "true"}
        subprocess.run(command, cwd=HOME / "node", env=environment, check=True, timeout=1800)
        stamp.write_text(wanted)
    shutil.copytree(GALLERY, HOME / "apps/gallery", dirs_exist_ok=True)
    script = HOME / "apps/gallery/desktop"
    script.write_text(script.read_text().replace("/opt/apps", str(HOME / "apps")))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return HOME


def squares(page: Page, number: int) -> None:
    field = page.get_by_label("Number").or_(page.locator("input[type=number], input.bk-input")).first
    expect(field).to_be_visible(timeout=SLOW)
    field.fill(str(number))
    field.press("Enter")
    field.press("Tab")
    if page.get_by_role("button", name="Submit").count():
        answer = page.get_by_label("Square", exact=True)
        for _ in range(3):  # its event stream may have ended with the sleep; the next click opens another
            page.get_by_role("button", name="Submit").click()
            with contextlib.suppress(AssertionError):
                expect(answer).to_have_value(f"The square is {number**2}", timeout=20_000)
                return
        expect(answer).to_have_value(f"The square is {number**2}")
    else:
        expect(page.get_by_text(f"The square is {number**2}")).to_be_visible(timeout=SLOW)


def echo(page: Page, number: int) -> None:
    page.get_by_label("Text").fill(f"hello {number}")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_text(f"You said hello {number}")).to_be_visible(timeout=SLOW)


def databases(page: Page, number: int) -> None:
    page.goto(
        page.url.split("/", 3)[0] + "//" + page.url.split("/", 3)[2] + f"/mine?sql=select+{number}*2+as+twice"
    )
    expect(page.get_by_role("cell", name=str(number * 2))).to_be_visible(timeout=SLOW)


def boards(page: Page, number: int) -> None:
    page.reload(wait_until="domcontentloaded")
    expect(page.get_by_text("No dashboards are active").first).to_be_visible(timeout=SLOW)


def flows(page: Page, number: int) -> None:
    page.reload(wait_until="domcontentloaded")
    expect(page.get_by_text("Deploy", exact=True).first).to_be_visible(timeout=SLOW)


def editor(page: Page, number: int) -> None:
    page.reload(wait_until="domcontentloaded")
    expect(
        page.locator(".monaco-workbench .explorer-viewlet, .monaco-workbench .activitybar").first
    ).to_be_visible(timeout=SLOW)


def desktop(page: Page, number: int) -> None:
    page.goto("/".join(page.url.split("/", 3)[:3]) + "/vnc.html?autoconnect=1&resize=remote&reconnect=1")
    screen = page.locator("canvas").last
    expect(screen).to_be_visible(timeout=SLOW)
    page.wait_for_timeout(3000)
    screen.click(position={"x": 200, "y": 200})
    page.keyboard.type(f"echo {number} >> ~/typed\n", delay=60)


def terminal(page: Page, number: int) -> None:
    expect(page.locator(".xterm-screen").first).to_be_visible(timeout=SLOW)
    page.locator(".xterm-screen").first.click()
    page.keyboard.type(f"echo {number} >> ~/typed\n", delay=60)


USES: dict[str, Callable[[Page, int], None]] = {
    "code-server": editor,
    "dash": squares,
    "datasette": databases,
    "desktop": desktop,
    "gradio": squares,
    "node-red": flows,
    "panel": squares,
    "shiny": squares,
    "socketio": echo,
    "streamlit": squares,
    "tensorboard": boards,
    "terminal": terminal,
}


def test_every_app_of_the_gallery_is_tried() -> None:
    assert set(USES) == {path.stem for path in GALLERY.glob("*.toml")}


@pytest.mark.parametrize("name", USES)
def test_an_app_is_used_suspended_and_woken(name: str, home: Path, site_with, person) -> None:
    if name == "terminal" and not shutil.which("ttyd"):
        pytest.skip("ttyd is not installed (Debian 12 and 13 have no such package)")
    text = (GALLERY / f"{name}.toml").read_text(encoding="utf-8")
    text = text.replace("/opt/apps", str(home / "apps")).replace("/opt/node", str(home / "node"))
    site = site_with(text.replace("{", "{{").replace("}", "}}"), people=("alice",))
    page = person(viewport={"width": 1400, "height": 900})
    site.sign_in(page, "alice")
    until("it runs or has failed", lambda: state(site) in {"running", "failed"}, 120)
    told = [site.admin("GET", f"/agents/alice/{what}").body.decode() for what in ("logs", "why")]
    assert state(site) == "running", told
    page.wait_for_url(lambda url: "/auth" not in url, timeout=SLOW)
    USES[name](page, 7)
    until("it sleeps", lambda: suspend(site), 60)  # not while the page still loads something
    USES[name](page, 9)
    until("it is awake", lambda: state(site) == "running", 30)
    if name in {"desktop", "terminal"}:
        until("it was typed", lambda: (site.data("alice") / "typed").read_text().split() == ["7", "9"], 30)
    if pictures := os.environ.get("GALLERY_PICTURES"):
        page.screenshot(path=Path(pictures, f"{name}.png"))


def suspend(site) -> bool:
    return site.admin("PUT", "/agents/alice/state?wait=20", {"state": "suspended"}).status == 200


def state(site) -> str:
    return site.admin("GET", "/agents/alice/state").json()["state"]
