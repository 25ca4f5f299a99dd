"""The command line from elsewhere: over TLS, with what proves the manager and what proves the administrator."""

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.installation import Installation


@pytest.fixture(scope="module")
def site():
    base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    base.chmod(0o755)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    token = secrets.token_urlsafe(32)
    (base / "tokens").write_text(f"{token}\n")
    (base / "tokens").chmod(0o600)
    with Installation(base) as site:
        text = site.config.read_text()
        listen = f'listen = ["127.0.0.1:{port}"]\ntoken_file = "{base}/tokens"\n'
        site.config.write_text(text.replace("[manager]\n", f"[manager]\n{listen}"))
        site.start("manager")
        site.url = f"https://127.0.0.1:{port}"
        site.token = base / "my-token"
        site.token.write_text(token)
        yield site


@pytest.fixture
def run(site):
    def run(*arguments, token=None):
        env = {name: value for name, value in os.environ.items() if not name.startswith("DISPATCHER_")}
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "dispatcher",
                "--manager",
                site.url,
                "--token-file",
                token or site.token,
                *arguments,
            ],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture
def fingerprint(site):
    log = (site.base / "manager.log").read_text()
    return re.search(r"fingerprint=\"?(?:sha256:)?([0-9a-fA-F:]{64,95})", log, re.IGNORECASE)[1]


def test_the_fingerprint_that_the_manager_logs_is_enough(run, fingerprint):
    done = run("--fingerprint", fingerprint, "list")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_certificate_of_nobody_known_is_refused_with_what_to_do(run):
    done = run("list")
    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    assert "is not trusted" in done.stderr
    assert "fingerprint" in done.stderr


def test_another_fingerprint_is_refused_with_both(run, fingerprint):
    other = "0" * 64
    done = run("--fingerprint", other, "list")
    assert done.returncode == 5
    assert other in done.stderr
    assert fingerprint.replace(":", "").lower() in done.stderr


def test_k_continues_and_reports_what_it_skips(run):
    done = run("-k", "list")
    assert done.returncode == 0
    assert "-k: the manager's certificate is not checked" in done.stderr


def test_without_the_right_token_nothing_is_told(run, site, fingerprint):
    wrong = site.base / "wrong-token"
    wrong.write_text(secrets.token_urlsafe(32))
    for words in (["list"], ["add", "mallory", "--no-password"], ["reload"]):
        done = run("--fingerprint", fingerprint, *words, token=wrong)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1


def test_no_ssl_contradicts_https(run):
    done = run("--no-ssl", "list")
    assert done.returncode == 2
    assert "--no-ssl" in done.stderr
