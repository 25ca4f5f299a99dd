"""The manager over TCP: who is let in, whom the client believes, and what each is told."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dispatcher.client.manager_client import ManagerClient
from dispatcher.client.transport import Transport
from dispatcher.plugin.errors import BadRequest, ConfigError, Forbidden, ManagerUnreachable, Unauthorized
from dispatcher.manager.rest import server
from tests.support.certificates import Authority
from tests.support.installation import until
from tests.support.manager_process import client_of, manager_in

ROOT = Path(__file__).parent.parent.parent
TOKEN = "a-token-of-enough-length-to-be-one"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"# for the tests\n{TOKEN}  # of mine\n\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def signed(short_tmp, monkeypatch, authority, tokens):
    """A manager whose certificate the authority has signed; it believes the authority's clients."""
    certificate, key = authority.issue("server", ["127.0.0.1", "localhost"])
    tables = {
        "manager": {
            "listen": ["127.0.0.1:0"],
            "tls_cert": str(certificate),
            "tls_key": str(key),
            "token_file": str(tokens),
            "client_ca": str(authority.path),
        }
    }
    with manager_in(short_tmp, monkeypatch, **tables) as manager:
        yield manager


def url(manager, host="127.0.0.1"):
    return f"https://{host}:{manager.addresses[0].rpartition(':')[2]}"


def remote(manager, host="127.0.0.1", **options):
    return ManagerClient(Transport(url(manager, host), **options))


def test_a_token_lets_in(signed, authority):
    client = remote(signed, ca_file=authority.path, token=TOKEN)
    assert client.agents() == {"agents": []}
    assert client.create_agent("alice", "correct horse")["name"] == "alice"
    client.close()


@pytest.mark.parametrize("token", [None, "a-token-of-enough-length-to-be-onf", TOKEN[:-1], TOKEN + "x", "x"])
def test_no_and_wrong_tokens_do_not(signed, authority, token):
    client = remote(signed, ca_file=authority.path, token=token)
    for ask in (client.agents, client.top, client.reload):
        with pytest.raises(Unauthorized) as caught:
            ask()
        assert caught.value.fix
    assert client.healthz() == {"status": "ok"}
    client.close()
    context = ssl.create_default_context(cafile=authority.path)
    for path in ("/metrics", "/openapi.json"):
        connection = http.client.HTTPSConnection(url(signed).removeprefix("https://"), context=context, timeout=10)
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        assert connection.getresponse().status == 401
        connection.close()


def together(certificate, key):
    path = certificate.with_suffix(".both")
    path.write_bytes(certificate.read_bytes() + key.read_bytes())
    return path


def test_a_client_certificate_lets_in(signed, authority):
    certificate, key = authority.issue("administrator")
    client = remote(signed, ca_file=authority.path, cert_file=together(certificate, key))
    assert client.agents() == {"agents": []}
    client.close()


@pytest.mark.parametrize("kind", ["stranger", "expired"])
def test_a_client_certificate_of_somebody_else_or_of_the_past_does_not(signed, authority, tmp_path, kind):
    if kind == "stranger":
        certificate, key = Authority(tmp_path, "another").issue("administrator")
    else:
        certificate, key = authority.issue("late", days=-1)
    client = remote(signed, ca_file=authority.path, cert_file=together(certificate, key))
    with pytest.raises(ManagerUnreachable) as caught:
        client.agents()
    assert "certificate" in str(caught.value)
    client.close()


def test_an_expired_certificate_of_the_manager_is_refused(short_tmp, monkeypatch, authority, tokens):
    certificate, key = authority.issue("expired", ["127.0.0.1"], days=-1)
    tables = {
        "listen": ["127.0.0.1:0"],
        "tls_cert": str(certificate),
        "tls_key": str(key),
        "token_file": str(tokens),
    }
    with manager_in(short_tmp, monkeypatch, manager=tables) as manager:
        client = remote(manager, ca_file=authority.path, token=TOKEN)
        with pytest.raises(ManagerUnreachable) as caught:
            client.agents()
        assert "expired" in caught.value.why
        skipping = remote(manager, verify=False, token=TOKEN)
        assert skipping.agents() == {"agents": []}
        skipping.close()


def test_a_certificate_for_another_host_is_refused(short_tmp, monkeypatch, authority, tokens):
    certificate, key = authority.issue("other", ["manager.example.org"])
    tables = {
        "listen": ["127.0.0.1:0"],
        "tls_cert": str(certificate),
        "tls_key": str(key),
        "token_file": str(tokens),
    }
    with manager_in(short_tmp, monkeypatch, manager=tables) as manager:
        with pytest.raises(ManagerUnreachable) as caught:
            remote(manager, ca_file=authority.path, token=TOKEN).agents()
        assert "127.0.0.1" in caught.value.why
        with pytest.raises(ManagerUnreachable) as caught:
            remote(manager, "localhost", ca_file=authority.path, token=TOKEN).agents()
        assert "localhost" in caught.value.why


def test_a_certificate_of_an_unknown_authority_is_refused(signed, tmp_path):
    stranger = Authority(tmp_path, "another")
    for options in ({"ca_file": stranger.path}, {}):
        with pytest.raises(ManagerUnreachable) as caught:
            remote(signed, token=TOKEN, **options).agents()
        assert "certificate" in caught.value.what
        assert "fingerprint" in caught.value.fix


def test_the_token_is_not_sent_to_an_untrusted_server(short_tmp, authority, tmp_path):
    """A thief in the middle hears nothing but a handshake."""
    certificate, key = Authority(tmp_path, "thief").issue("thief", ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))
    heard = []

    def thief():
        for _ in range(2):
            sock, _ = listener.accept()
            try:
                with context.wrap_socket(sock, server_side=True) as secure:
                    heard.append(secure.recv(65536))
            except OSError:
                sock.close()

    thread = threading.Thread(target=thief)
    thread.start()
    address = f"https://127.0.0.1:{listener.getsockname()[1]}"
    for options in ({"ca_file": authority.path}, {"fingerprint": "0" * 64}):
        with pytest.raises(ManagerUnreachable):
            ManagerClient(Transport(address, token=TOKEN, **options)).agents()
    thread.join(10)
    listener.close()
    assert b"".join(heard) == b""


@pytest.fixture
def self_signed(short_tmp, monkeypatch, tokens, caplog):
    """A manager with the certificate that it makes by itself."""
    tables = {"listen": ["127.0.0.1:0"], "token_file": str(tokens)}
    with manager_in(short_tmp, monkeypatch, manager=tables) as manager:
        yield manager


def shown_fingerprint(manager):
    text = (manager.paths.secrets_dir / "manager.crt").read_text()
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(text)).hexdigest()


def test_a_self_signed_certificate_is_made_once_with_a_private_key(self_signed, short_tmp, monkeypatch, tokens):
    secrets = self_signed.paths.secrets_dir
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert stat.S_IMODE((secrets / "manager.key").stat().st_mode) == 0o600
    before = shown_fingerprint(self_signed)
    self_signed.close()
    with manager_in(
        short_tmp, monkeypatch, manager={"listen": ["127.0.0.1:0"], "token_file": str(tokens)}
    ) as again:
        assert shown_fingerprint(again) == before


@pytest.mark.parametrize(
    "form", [str, str.upper, lambda f: ":".join(f[i : i + 2] for i in range(0, 64, 2)), "SHA256:{}".format]
)
def test_its_fingerprint_is_enough(self_signed, form):
    client = remote(self_signed, fingerprint=form(shown_fingerprint(self_signed)), token=TOKEN)
    assert client.agents() == {"agents": []}
    client.close()


def test_another_fingerprint_is_refused_with_both(self_signed):
    good = shown_fingerprint(self_signed)
    bad = ("0" if good[0] != "0" else "1") + good[1:]
    with pytest.raises(ManagerUnreachable) as caught:
        remote(self_signed, fingerprint=bad, token=TOKEN).agents()
    assert "fingerprint" in caught.value.what
    assert good in caught.value.why
    assert bad in caught.value.why
    with pytest.raises(ManagerUnreachable):  # -k does not undo it
        remote(self_signed, fingerprint=bad, token=TOKEN, verify=False).agents()


def test_k_skips_the_check(self_signed):
    with pytest.raises(ManagerUnreachable):
        remote(self_signed, token=TOKEN).agents()
    client = remote(self_signed, token=TOKEN, verify=False)
    assert client.agents() == {"agents": []}
    client.close()


def test_the_certificate_itself_can_be_trusted(self_signed):
    client = remote(self_signed, "localhost", ca_file=self_signed.paths.secrets_dir / "manager.crt", token=TOKEN)
    assert client.agents() == {"agents": []}
    client.close()


def test_the_proxys_role_is_not_there(self_signed):
    port = int(url(self_signed).rpartition(":")[2])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
    connection.request(
        "POST",
        "/sessions",
        json.dumps({"user": "alice", "password": "x" * 8, "address": ""}),
        {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"},
    )
    assert connection.getresponse().status == 405
    connection.close()


def test_old_tls_is_refused(self_signed):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    port = int(url(self_signed).rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 10) as sock, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(sock)


def test_plain_http_is_told_nothing(self_signed):
    port = int(url(self_signed).rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(b"GET /agents HTTP/1.1\r\nHost: x\r\n\r\n")
        data = b""
        try:
            while piece := sock.recv(4096):
                data += piece
        except ConnectionResetError:
            pass
    assert b"agents" not in data
    assert b"HTTP/1.1 200" not in data
    with pytest.raises(ManagerUnreachable) as caught:
        ManagerClient(Transport(f"http://127.0.0.1:{port}", ssl=False, token=TOKEN)).agents()
    assert caught.value.fix


def test_clients_that_do_not_finish_a_handshake_hold_nobody_up(self_signed):
    port = int(url(self_signed).rpartition(":")[2])
    idle = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(50)]
    client = remote(self_signed, verify=False, token=TOKEN)
    began = time.monotonic()
    assert client.agents() == {"agents": []}
    assert time.monotonic() - began < 3
    client.close()
    for sock in idle:
        sock.close()


def encrypted(port):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), 10))


SERVER = """
import socket, ssl, sys, time
from dispatcher.manager.rest.server import Server

def app(environ, start_response):
    start_response("200 OK", [])
    return [b"ok"]

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1], sys.argv[2])
sock = socket.create_server(("127.0.0.1", 0))
Server(sock, app, 2, context).start()
print(sock.getsockname()[1], flush=True)
time.sleep(60)
"""


def test_a_flood_of_tls_messages_takes_turns_with_others_and_is_ended(authority):
    """Strangers send KeyUpdate messages, which have no end and hold no data."""
    files = [str(path) for path in authority.issue("server", ["127.0.0.1"])]
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-c", SERVER, *files]
        server = stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE))
        stack.callback(server.kill)
        port = int(server.stdout.readline())
        began = time.monotonic()
        command = [sys.executable, str(ROOT / "tests/support/tls_key_updates.py"), str(port), "30", "4"]
        flood = stack.enter_context(subprocess.Popen(command))
        stack.callback(flood.kill)
        while flood.poll() is None:
            assert time.monotonic() - began < 25, "the connections are not closed"
            start = time.monotonic()
            with encrypted(port) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
            assert time.monotonic() - start < 3
            time.sleep(0.1)


@pytest.mark.parametrize("stage", ["handshake", "head", "body"])
def test_slow_clients_hold_no_thread(short_tmp, tokens, monkeypatch, stage):
    tables = {"manager": {"listen": ["127.0.0.1:0"], "token_file": str(tokens), "threads": 2}}
    with manager_in(short_tmp, monkeypatch, **tables) as manager:
        port = int(url(manager).rpartition(":")[2])
        begin = {
            "handshake": b"\x16\x03\x01\x02\x00\x01",
            "head": b"GET /agents HTTP/1.1\r\nX-Long: ",
            "body": b"POST /agents HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n",
        }[stage]
        slow = [
            socket.create_connection(("127.0.0.1", port), 10) if stage == "handshake" else encrypted(port)
            for _ in range(120)
        ]
        done = threading.Event()

        def drip(sock):
            with contextlib.suppress(OSError), sock:
                sock.sendall(begin)
                while not done.wait(0.2):
                    sock.sendall(b"x")

        threads = [threading.Thread(target=drip, args=(sock,)) for sock in slow]
        for thread in threads:
            thread.start()
        try:
            time.sleep(0.5)
            client = remote(manager, verify=False, token=TOKEN)
            began = time.monotonic()
            assert client.agents() == {"agents": []}
            assert time.monotonic() - began < 3
            client.close()
        finally:
            done.set()
            for thread in threads:
                thread.join(5)


def test_one_address_does_not_take_all_connections(short_tmp, monkeypatch, tokens):
    monkeypatch.setattr(server, "MAX_OF_ADDRESS", 3)
    tables = {"manager": {"listen": ["127.0.0.1:0"], "token_file": str(tokens)}}
    with manager_in(short_tmp, monkeypatch, **tables) as manager:
        port = int(url(manager).rpartition(":")[2])
        idle = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(4)]
        assert idle[-1].recv(1) == b""
        with socket.create_connection(("127.0.0.1", port), 10, source_address=("127.0.0.2", 0)) as other:
            other.settimeout(0.5)
            with pytest.raises(TimeoutError):
                other.recv(1)
        for sock in idle:
            sock.close()
        client = remote(manager, verify=False, token=TOKEN)

        def accepted():
            # The manager has not noticed yet that the connections are closed: it closes this one too.
            with contextlib.suppress(ManagerUnreachable):
                return client.agents() == {"agents": []}

        until("there is room again", accepted)
        client.close()


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [(TOKEN, 0o644, "chmod 600"), ("short", 0o600, "too short"), (None, None, "No such file")],
)
def test_token_files_that_protect_nothing_are_refused(short_tmp, monkeypatch, tmp_path, content, mode, words):
    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        with manager_in(short_tmp, monkeypatch, manager={"listen": ["127.0.0.1:0"], "token_file": str(path)}):
            pass
    assert words in str(caught.value)
    assert not (short_tmp / "r/manager.sock").exists()


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"tls_cert": "/nonexistent.pem", "tls_key": "/nonexistent.key"}, "manager.tls_cert"),
        ({"tls_cert": "/nonexistent.pem"}, "manager.tls_key"),
        ({"client_ca": "/nonexistent.pem"}, "manager.client_ca"),
        ({"listen": ["nonsense"]}, "manager.listen"),
        ({"listen": ["127.0.0.1:99999"]}, "manager.listen"),
        ({"listen": ["[fe80::1]:0"]}, "Cannot listen"),
    ],
)
def test_settings_that_cannot_be_are_named_and_nothing_is_left(short_tmp, monkeypatch, tables, words):
    with pytest.raises(ConfigError) as caught:
        with manager_in(short_tmp, monkeypatch, manager={"listen": ["127.0.0.1:0"]} | tables):
            pass
    assert words in str(caught.value)
    assert not list((short_tmp / "r").glob("*.sock"))
    with manager_in(short_tmp, monkeypatch) as manager, client_of(manager) as client:
        assert client.agents() == {"agents": []}


def test_reload_takes_new_certificates_and_tokens(signed, authority, tokens, monkeypatch):
    from dispatcher.config.load import Config
    from dispatcher.manager import app

    before = remote(signed, ca_file=authority.path, token=TOKEN)
    assert before.agents() == {"agents": []}
    certificate, key = authority.issue("renewed", ["127.0.0.1"])
    tokens.write_text("another-token-of-enough-length\n")
    manager = signed.config.manager.model_copy(update={"tls_cert": certificate, "tls_key": key, "threads": 30})
    new = signed.config.model_copy(update={"manager": manager})
    monkeypatch.setattr(app, "load", lambda _path: new)
    changed, _ = signed.reload()
    assert any("certificate" in sentence for sentence in changed)
    assert any("manager.threads" in sentence and "restart" in sentence for sentence in changed)
    with pytest.raises(Unauthorized):
        before.agents()
    fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.read_text())).hexdigest()
    after = remote(signed, fingerprint=fingerprint, token="another-token-of-enough-length")
    assert after.agents() == {"agents": []}
    before.close()
    after.close()
    assert isinstance(signed.config, Config)


def test_a_reload_that_fails_changes_nothing(signed, authority, tokens, monkeypatch):
    from dispatcher.manager import app

    tokens.write_text("short\n")
    monkeypatch.setattr(app, "load", lambda _path: signed.config)
    with client_of(signed) as admin, pytest.raises(BadRequest) as caught:
        admin.reload()
    assert "too short" in caught.value.why or "too short" in caught.value.what
    client = remote(signed, ca_file=authority.path, token=TOKEN)
    assert client.agents() == {"agents": []}
    client.close()


def test_the_fingerprint_is_logged(short_tmp, monkeypatch, tokens, capsys):
    from dispatcher.common import log

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        log.configure("info", "json")
        with manager_in(
            short_tmp, monkeypatch, manager={"listen": ["127.0.0.1:0"], "token_file": str(tokens)}
        ) as m:
            expected = shown_fingerprint(m)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.raiseExceptions = True
    text = capsys.readouterr().err
    assert expected in text
    assert TOKEN not in text


def test_connections_that_are_too_many_are_closed(short_tmp, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 5)
    with manager_in(short_tmp, monkeypatch) as manager:
        idle = []
        for _ in range(8):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(5)
            sock.connect(str(manager.paths.manager_socket))
            idle.append(sock)
        assert idle[-1].recv(1) == b""
        for sock in idle:
            sock.close()
        time.sleep(0.1)
        with client_of(manager) as client:
            assert client.agents() == {"agents": []}


def test_api_tokens_open_what_their_scopes_say_until_they_are_revoked(signed, authority):
    with contextlib.ExitStack() as stack:
        local = stack.enter_context(client_of(signed))
        made, clients = {}, {}
        for scope in ("metrics", "read", "admin"):
            made[scope] = local.create_token(service="script", scopes=[scope])
            clients[scope] = remote(signed, ca_file=authority.path, token=made[scope]["token"])
            stack.callback(clients[scope].close)
        assert clients["read"].agents() == {"agents": []}
        assert clients["admin"].create_agent("alice", "correct horse")["name"] == "alice"
        with pytest.raises(Forbidden, match="needs the scope admin, and has read"):
            clients["read"].create_agent("bob", "correct horse")
        with pytest.raises(Forbidden, match="needs the scope read, and has metrics"):
            clients["metrics"].agents()
        local.revoke_token(made["admin"]["id"])
        with pytest.raises(Unauthorized):
            clients["admin"].agents()
