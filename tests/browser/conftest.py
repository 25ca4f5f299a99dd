"""Real browsers against a real installation: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.support import steady_chromium
from tests.support.installation import PASSWORD, Installation

#: Other tests run beside these on few cores.
expect.set_options(timeout=15_000)
ROOT = Path(__file__).parent.parent.parent
CHROMIUM = steady_chromium.__file__
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP *.test 127.0.0.1",  # hosts that a browser does not trust as it does localhost
]  # fmt: skip
DEMO = '[apps.demo]\ntitle = "Notebook"\n[apps.demo.subprocess]\ncommand = ["{python}", "-m", "dispatcher.demo", "--unix", "{{socket}}"]\n'


@pytest.fixture(scope="module")  # its loop would still run in the tests that come after
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def person(chromium: Browser):
    """Make people: each call is a browser profile of its own with one open page."""
    contexts: list[BrowserContext] = []

    def make(**settings) -> Page:
        context = chromium.new_context(**{"viewport": {"width": 1100, "height": 760}} | settings)
        context.set_default_timeout(20_000)
        contexts.append(context)
        return context.new_page()

    yield make
    for context in contexts:
        context.close()


class Site(Installation):
    """An installation with both daemons up, as a person knows it."""

    def __init__(self, base: Path, apps: str = DEMO, *, people=("alice", "bob"), tls=False, **more: str) -> None:
        super().__init__(base, apps, **more)
        self.tls = tls
        self.config.write_text(re.sub(r"(?<!_)PORT", str(self.port), self.config.read_text()))
        self.url = f"http://127.0.0.1:{self.port}"
        try:
            self.start("manager")
            self.start("proxy")
            for name in people:
                self.add(name)
        except BaseException:
            self.close()
            raise

    def sign_in(self, page: Page, name: str, path: str = "/") -> None:
        page.goto(self.url + path)
        page.get_by_label("Name").fill(name)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign in").click()

    def data(self, name: str) -> Path:
        """The directory of an agent's data."""
        from dispatcher.plugin import names

        return self.base / "state/agents" / names.key(name) / "data"

    def web(self, *values, **more):
        """As `Installation.web`; over TLS it only looks whether somebody listens."""
        if not self.tls:
            return super().web(*values, **more)
        with socket.create_connection(("127.0.0.1", self.port), 5):
            return types.SimpleNamespace(status=200)

    def pids(self, name: str) -> list[int]:
        """The processes of an agent, by the user id that it has to itself."""
        uid = self.admin("GET", f"/agents/{name}/runtime").json()["uid"]
        return [
            int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and path.stat().st_uid == uid
        ]


def _site(*values, **more):
    base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    base.chmod(0o755)
    site = None
    try:
        site = Site(base, *values, **more)
        yield site
    finally:
        if site is not None:
            site.close()


def _maker():
    made = []

    def make(*values, **more) -> Site:
        generator = _site(*values, **more)
        made.append(generator)
        return next(generator)

    yield make
    for generator in made:
        next(generator, None)


#: Make installations with other apps or settings, which end with the test or with its module.
site_with = pytest.fixture(_maker)
make_site = pytest.fixture(_maker, scope="module")


@pytest.fixture(scope="module")
def demo(make_site):
    """One installation with the demo app for all tests of a module."""
    return make_site()


def certificate(base: Path) -> str:
    """Make a certificate for localhost; return the proxy's settings for it."""
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-keyout", str(base / "key.pem"), "-out", str(base / "cert.pem"),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return f'tls_cert = "{base}/cert.pem"\ntls_key = "{base}/key.pem"'


@pytest.fixture(scope="session")
def real_apps() -> Path:
    """A virtual environment with real applications, made once and kept in the clone's cache."""
    home = ROOT / ".cache" / "real-apps"
    wanted = ["jupyterlab>=4.4,<5", "marimo>=0.14,<1"]
    stamp = home / "installed"
    if not stamp.exists() or stamp.read_text() != "\n".join(wanted):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        pip = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *wanted], check=True, timeout=600)
        stamp.write_text("\n".join(wanted))
    return home


def example(name: str, home: Path) -> str:
    """The apps of an example file, its programs taken from `home`, braces kept for `Installation`."""
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert "/opt/apps/bin/" in text
    text = text.replace("/opt/apps", str(home))
    return text.replace("{", "{{").replace("}", "}}")


def until_the_kernel_is_idle(page: Page) -> None:
    """Wait as a person does: JupyterLab forgets a cell that is run before its kernel is there."""
    expect(page.get_by_role("button", name="| Idle")).to_be_visible(timeout=90_000)
