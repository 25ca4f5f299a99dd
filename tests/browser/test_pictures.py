"""The pictures of the documentation, taken of a real installation.

`PICTURES=docs/static/pictures .venv/bin/pytest tests/browser/test_pictures.py` replaces them.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.test_waiting import SLOW, apps

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
PICTURES = ROOT / "docs/static/pictures"
WIDE, PHONE = {"width": 860, "height": 460}, {"width": 390, "height": 700}


def shown() -> set[str]:
    """Return the names of the pictures that pages of the documentation show."""
    pages = [page.read_text() for page in (ROOT / "docs").rglob("*.md")]
    return {
        name for page in pages for name in re.findall(r"!\[[^\]]+\]\(\S*?static/pictures/([\w-]+)\.png\)", page)
    }


@pytest.fixture(scope="module")
def take(tmp_path_factory):
    """Take a picture; the function returns those that were taken, by name."""
    temporary = tmp_path_factory.mktemp("pictures")
    kept, wanted = Path(os.environ.get("PICTURES") or temporary), shown()
    taken: dict[str, Path] = {}

    def shoot(page: Page, name: str) -> None:
        page.evaluate("document.fonts.ready")
        wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wider <= 0, f"{name} is {wider} pixels wider than the window"
        taken[name] = (kept if name in wanted else temporary) / f"{name}.png"
        page.screenshot(path=taken[name], animations="disabled", caret="hide")

    shoot.taken = taken  # type: ignore[attr-defined]
    return shoot


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG file (PNG specification, IHDR)."""
    return struct.unpack(">II", path.read_bytes()[16:24])


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_a_person_meets_these_pages(make_site, person, take, viewport) -> None:
    site = make_site(apps(SLOW.replace("Slow app", "Notebook")), people=("alice",), proxy='hold = "300ms"')
    suffix = "-phone" if viewport is PHONE else ""
    page = person(viewport=viewport)
    page.goto(site.url)
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    take(page, f"sign-in{suffix}")
    site.sign_in(page, "alice")
    expect(page.get_by_text("This page opens the app as soon as it is ready")).to_be_visible()
    expect(page.locator(".stages .now")).to_be_visible()
    take(page, f"waiting{suffix}")
    expect(page.get_by_role("heading", name="Notebook")).to_be_visible()
    page.goto(f"{site.url}/auth/")
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    take(page, f"apps{suffix}")
    page.goto(f"{site.url}/auth/account")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    take(page, f"account{suffix}")


def test_the_documentation_shows_them(take) -> None:
    assert shown(), "no page of the documentation shows a picture"
    assert shown() <= set(take.taken)
    assert {path.stem for path in PICTURES.glob("*")} == shown()
    for name in shown():
        assert size(PICTURES / f"{name}.png") == size(take.taken[name])
