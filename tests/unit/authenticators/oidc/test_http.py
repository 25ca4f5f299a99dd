"""A provider that answers with nonsense, without end, or with a redirect: told in time, and nothing else is asked."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import pytest

pytest.importorskip("joserfc", reason="joserfc is not installed")

from joserfc.jwk import RSAKey

from dispatcher.plugin import Deadline, Unavailable
from dispatcher_oidc import discovery
from dispatcher_oidc.discovery import Discovery
from dispatcher_oidc.http import MAX_BODY, Provider
from dispatcher_oidc.options import OidcOptions

KEY = RSAKey.generate_key(2048, {"kid": "one"})


class FakeProvider:
    """Answers each path with fixed bytes; :ivar asked: the paths, in order."""

    def __init__(self):
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        self.asked, self.answers, self.pause = [], {}, 0.0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.sock.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection, contextlib.suppress(OSError):
            path = connection.recv(65536).split(b" ")[1].decode()
            self.asked.append(path)
            answer = self.answers.get(path, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            if not self.pause:
                connection.sendall(answer)
            for at in range(len(answer) if self.pause else 0):
                connection.sendall(answer[at : at + 1])
                time.sleep(self.pause)

    def json(self, path, value, status="200 OK"):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.answers[path] = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    def redirect(self, path, to):
        self.answers[path] = f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()

    def metadata(self, **change):
        value = {"issuer": self.url, "authorization_endpoint": f"{self.url}/a", "token_endpoint": f"{self.url}/t"}
        self.json(CONFIGURATION, value | {"jwks_uri": f"{self.url}/keys"} | change)


CONFIGURATION = "/.well-known/openid-configuration"


@pytest.fixture
def fake():
    found = FakeProvider()
    yield found
    found.sock.close()


def new(fake, **more):
    options = OidcOptions(issuer=fake.url, client_id="x", timeout="1s", **more)
    return Discovery(options, Provider(options))


def why(call):
    with pytest.raises(Unavailable) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"issuer": "https://other.example"}']
)
def test_nonsense_is_told(fake, body):
    fake.json(CONFIGURATION, body)
    assert CONFIGURATION in why(lambda: new(fake).metadata(Deadline(5)))


def test_what_is_not_http_or_too_long_is_told(fake):
    for answer in (b"SSH-2.0-x\r\n", b"", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"):
        fake.answers[CONFIGURATION] = answer
        assert "not HTTP" in why(lambda: new(fake).metadata(Deadline(5)))
    fake.answers[CONFIGURATION] = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (MAX_BODY + 5)
    assert f"more than {MAX_BODY} bytes" in why(lambda: new(fake).metadata(Deadline(5)))


def test_a_provider_that_sends_a_byte_now_and_then_is_not_waited_for(fake):
    fake.metadata()
    fake.pause = 0.1
    begun = time.monotonic()
    assert "does not answer in time" in why(lambda: new(fake).metadata(Deadline(5)))
    assert time.monotonic() - begun < 3
    begun = time.monotonic()
    assert "does not answer in time" in why(lambda: new(fake).metadata(Deadline(0.3)))
    assert time.monotonic() - begun < 1.5


def test_redirects_stay_on_the_same_host(fake):
    fake.metadata()
    fake.answers["/moved"] = fake.answers[CONFIGURATION]
    fake.redirect(CONFIGURATION, "/moved")
    assert new(fake).metadata(Deadline(5)).token == f"{fake.url}/t"
    port = fake.url.rpartition(":")[2]
    for to in (
        "http://evil.example/",
        f"http://localhost:{port}/moved",
        "file:///etc/passwd",
        "//evil.example/x",
        "",
    ):
        fake.redirect(CONFIGURATION, to)
        told = why(lambda: new(fake).metadata(Deadline(5)))
        assert "redirects to another host" in told or "status 302" in told
    fake.redirect(CONFIGURATION, CONFIGURATION)
    fake.asked.clear()
    assert "302" in why(lambda: new(fake).metadata(Deadline(5)))
    assert len(fake.asked) <= 4


@pytest.mark.parametrize("name", ["authorization_endpoint", "token_endpoint", "jwks_uri"])
@pytest.mark.parametrize(
    "value", [None, "http://login.example.org/x", "javascript:alert(1)", 5, "/relative", "https://a b/"]
)
def test_an_address_without_encryption_is_refused(fake, name, value):
    fake.metadata(**{name: value})
    assert name in why(lambda: new(fake).metadata(Deadline(5)))


def test_an_access_token_follows_no_redirect(fake):
    fake.redirect("/me", "/there")
    options = OidcOptions(issuer=fake.url, client_id="x", timeout="1s")
    assert "302" in why(lambda: Provider(options).get_user(f"{fake.url}/me", Deadline(5), token="secret"))
    assert fake.asked == ["/me"]


def test_configuration_and_keys_are_kept_and_unknown_keys_asked_for_now_and_then(fake, monkeypatch):
    fake.metadata()
    fake.json("/keys", {"keys": [KEY.as_dict(private=False)]})
    found = new(fake)
    for _ in range(5):
        assert [key.kid for key in found.keys(Deadline(5))] == ["one"]
    assert fake.asked == [CONFIGURATION, "/keys"]
    for _ in range(5):
        found.keys(Deadline(5), unknown=True)
    assert fake.asked == [CONFIGURATION, "/keys"]
    clock = discovery.boottime
    monkeypatch.setattr(discovery, "boottime", lambda: clock() + 11)
    for _ in range(5):
        found.keys(Deadline(5), unknown=True)
    assert fake.asked == [CONFIGURATION, "/keys", "/keys"]
    monkeypatch.setattr(discovery, "boottime", lambda: clock() + 3700)
    found.keys(Deadline(5))
    assert fake.asked[3:] == [CONFIGURATION, "/keys"]


def test_a_provider_without_a_key_is_told(fake):
    fake.metadata()
    fake.json("/keys", {"keys": [{"kty": "oct", "k": "AAAA"}]})
    assert "no public key" in why(lambda: new(fake).keys(Deadline(5)))
