"""A certificate that is renewed as certbot does it, while manager and proxy run."""

import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.certificates import Authority
from tests.support.installation import Installation, until

pytestmark = [pytest.mark.root, pytest.mark.bubblewrap]


class Site(Installation):
    def web(self, *values, **more):
        with socket.create_connection(("127.0.0.1", self.port), 5):
            return SimpleNamespace(status=200)

    def served(self):
        return ssl.get_server_certificate(("127.0.0.1", self.port)).encode()

    def run(self, *words):
        command = [sys.executable, "-m", "dispatcher", "--config", str(self.config), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def site():
    base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    base.chmod(0o755)
    (base / "live").mkdir()
    (base / "archive").mkdir()
    made = Site(base, proxy='user = "nobody"\ntls_cert = "{base}/live/cert.pem"\ntls_key = "{base}/live/key.pem"')
    with made:
        renew(made, 1)
        made.start("manager")
        made.start("proxy")
        yield made


def renew(site, number):
    """Write a new pair, readable for root alone, and let the links lead to it."""
    for kind, path in zip(("cert", "key"), Authority(site.base).issue("localhost", ["127.0.0.1"]), strict=True):
        target = site.base / f"archive/{kind}{number}.pem"
        shutil.copy(path, target)
        target.chmod(0o600)
        link = site.base / f"live/{kind}.pem"
        link.unlink(missing_ok=True)
        link.symlink_to(f"../archive/{target.name}")


def test_a_reload_fails_while_the_proxy_cannot_read_the_new_certificate(site):
    before = site.served()
    assert site.run("doctor", "--json").stdout.count("a reload keeps the old certificate") == 2
    renew(site, 2)
    done = site.run("reload")
    assert done.returncode == 1 and "proxy.tls_key" in done.stderr and "the proxy has not" in done.stderr
    assert "serves another certificate" in site.run("doctor", "--json").stdout
    site.processes["proxy"].send_signal(signal.SIGHUP)
    assert site.served() == before
    for path in (site.base / "archive").iterdir():
        shutil.chown(path, "nobody")
    assert site.run("proxy", "--check").returncode == 0
    assert site.run("reload").returncode == 0
    until("the new certificate is served", lambda: site.served() == (site.base / "live/cert.pem").read_bytes())
    told = site.run("doctor", "--json").stdout
    assert "serves another certificate" not in told and "keeps the old certificate" not in told
