"""The site (`make docs`): it builds without a warning, and a browser loads nothing of it from elsewhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import ROOT
from tests.support.broken_words import BROKEN_WORDS

pytestmark = pytest.mark.xdist_group("site")  # which is built once

for name in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(name, reason="the extra [docs] is not installed")


LONG_HEADING = re.compile(r"<h[123]>[^<]*\w{12}")  # others have room


class References(HTMLParser):
    """What a page loads, and where its links lead."""

    def __init__(self):
        super().__init__()
        self.loaded, self.links, self.ids = [], [], set()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "a":
            self.links.append(found.get("href", ""))
        elif tag != "meta" and found.get("rel") not in {"canonical", "index", "search", "next", "prev"}:
            self.loaded += [found[key] for key in ("src", "href", "data") if found.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = re.search(
        r"^\t\$\(BIN\)/sphinx-build (.*) build/site$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )[1]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *command.split(), out], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    found = {}
    for path in site.rglob("*.html"):
        found[path] = References()
        found[path].feed(path.read_text())
    return found


def test_every_page_is_in_the_navigation(site, pages):
    index = pages[site / "docs/index.html"]
    linked = {(site / "docs" / link.partition("#")[0]).resolve() for link in index.links if "://" not in link}
    made = {site / path.relative_to(ROOT).with_suffix(".html") for path in ROOT.glob("docs/**/*.md")}
    assert made - linked - {site / "docs/index.html"} == set()
    assert "url=docs/index.html" in (site / "index.html").read_text()


def test_nothing_is_loaded_from_elsewhere(site, pages):
    foreign = [
        f"{page.relative_to(site)}: {url}"
        for page, found in pages.items()
        for url in found.loaded
        if urlsplit(url).scheme not in {"", "data"} or url.startswith("//")
    ]
    for style in site.rglob("*.css"):
        foreign += re.findall(r"""(?:@import|url\()\s*["']?(?:https?:)?//[^)"']*""", style.read_text())
    assert foreign == []


def test_links_lead_to_pages_anchors_and_files_of_the_site(site, pages):
    dead = []
    for page, found in pages.items():
        for link in found.links:
            url = urlsplit(link)
            if url.scheme or link.startswith("//") or page.name in {"genindex.html", "search.html"}:
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            if not target.exists() or (
                url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids
            ):
                dead.append(f"{page.relative_to(site)}: {link}")
    assert dead == []


@pytest.mark.browser
def test_no_word_of_a_heading_is_broken_on_a_phone(site):
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra [testing] is not installed")
    broken = []
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        for path in sorted(site.glob("docs/**/*.html")):
            if not LONG_HEADING.search(path.read_text()):
                continue
            page.goto(path.as_uri(), wait_until="domcontentloaded")
            for width in (390, 320):
                page.set_viewport_size({"width": width, "height": 800})
                found = page.evaluate(BROKEN_WORDS, "h1, h2, h3")
                broken += [f"{path.relative_to(site)} at {width} px: {word}" for word in found]
        browser.close()
    assert broken == []
