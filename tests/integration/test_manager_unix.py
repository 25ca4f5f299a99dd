"""The manager's Unix sockets with the real client: who may use them, and what a connection survives."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time

import pytest

from dispatcher.plugin import errors
from dispatcher.client.manager_client import ManagerClient
from dispatcher.client.transport import Transport
from dispatcher.plugin.errors import BadRequest, Conflict, Forbidden, ManagerUnreachable, NotFound
from dispatcher.manager.rest import server as wsgi_server
from tests.support.installation import UnixConnection, until
from tests.support.manager_process import client_of, manager_in


@pytest.fixture
def manager(short_tmp, monkeypatch):
    with manager_in(short_tmp, monkeypatch) as manager:
        yield manager


@pytest.fixture
def admin(manager):
    with client_of(manager) as client:
        yield client


@pytest.fixture
def proxy(manager):
    with client_of(manager, "proxy_socket") as client:
        yield client


def raw(path, data, timeout=5.0):
    """Send bytes, return everything that comes back."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout)
        sock.connect(str(path))
        sock.sendall(data)
        answer = b""
        try:
            while piece := sock.recv(65536):
                answer += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return answer


def test_modes(manager):
    paths = manager.paths
    for directory, mode in (
        (paths.run_dir, 0o755),
        (paths.state_dir, 0o711),
        (paths.secrets_dir, 0o700),
        (paths.proxy_dir, 0o700),
    ):
        assert stat.S_IMODE(directory.stat().st_mode) == mode
    for path in (paths.manager_socket, paths.proxy_socket, paths.feed_socket):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert path.stat().st_uid == os.geteuid()
    assert stat.S_IMODE(paths.database.stat().st_mode) == 0o600
    assert paths.proxy_socket.stat().st_gid == manager.accounts.proxy_gid


def test_errors_come_back_as_they_were(admin, proxy):
    admin.create_agent("alice", "correct horse")
    with pytest.raises(Conflict) as caught:
        admin.create_agent("alice")
    assert "exists" in caught.value.what
    with pytest.raises(NotFound) as caught:
        admin.agent("bob")
    assert caught.value.fix == "see: dispatcher list"
    with pytest.raises(Forbidden):
        proxy.login("alice", "wrong password", "192.0.2.1")
    with pytest.raises(BadRequest) as caught:
        admin.create_agent("carol", "short")
    assert "8 to 1024" in caught.value.why
    for _ in range(10):
        try:
            proxy.login("alice", "wrong password", "192.0.2.1")
        except Forbidden:
            continue
        except errors.TooManyRequests as error:
            assert error.retry_after >= 1
            break
    else:
        pytest.fail("never slowed down")


def test_the_clients_methods_work_end_to_end(admin, proxy):
    admin.create_agent("alice", "correct horse")
    admin.create_agent("alice", app="lab")
    assert admin.set_state("alice", "running", wait=5)["state"] == "running"
    assert admin.restart("alice", wait=5)["state"] == "running"
    assert admin.logs("alice", tail=1)["lines"] == ["two"]
    assert admin.check_provider("fake")["findings"]
    assert admin.delete_agent("alice:lab", keep_data=True, wait=5) == {}
    login = proxy.login("alice", "correct horse", "192.0.2.1", "Browser", None)
    sha256 = login["session"]["sha256"]
    assert proxy.lookup(sha256)["user"] == "alice"
    assert admin.sessions("alice")["sessions"][0]["user_agent"] == "Browser"
    renewed = proxy.change_password(sha256, "correct horse", "battery staple", "192.0.2.1")
    assert admin.revoke_session(renewed["session"]["sha256"][:16]) == {}
    assert admin.set_password("alice", "correct horse") == {}
    assert admin.healthz()["status"] == "ok"


def test_names_with_every_legal_character_reach_their_agent(admin):
    for name in ("abc@def.com", "a+b_c-d.e", "zoë", "日本", "a" * 255):
        admin.create_agent(name, "correct horse")
        assert admin.agent(name)["name"] == name
        assert admin.state(name)["state"] == "stopped"
        admin.delete_agent(name)


def test_one_client_serves_many_threads(manager, admin):
    admin.create_agent("alice", "correct horse")
    problems = []

    def ask():
        for _ in range(20):
            try:
                assert admin.agent("alice")["name"] == "alice"
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_a_client_survives_a_restart_of_the_manager(short_tmp, monkeypatch):
    with manager_in(short_tmp, monkeypatch) as manager:
        client = ManagerClient(f"unix://{manager.paths.manager_socket}")
        client.healthz()
    with pytest.raises(ManagerUnreachable) as caught:
        client.healthz()
    assert "does not exist" in caught.value.why
    assert "dispatcher serve" in caught.value.fix
    with manager_in(short_tmp, monkeypatch):
        assert client.healthz()["status"] == "ok"
        client.close()


def test_a_socket_that_nobody_listens_on(short_tmp):
    path = short_tmp / "x.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    with pytest.raises(ManagerUnreachable) as caught:
        ManagerClient(f"unix://{path}").healthz()
    assert "refused" in caught.value.why


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "Another program"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nhi", "Another program"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "invalid HTTP"),
        (b"", "Remote end closed"),
    ],
)
def test_something_else_that_listens_there(short_tmp, answer, words):
    path = short_tmp / "x.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve():
        sock, _ = listener.accept()
        sock.recv(65536)
        sock.sendall(answer)
        sock.close()

    thread = threading.Thread(target=serve)
    thread.start()
    client = ManagerClient(f"unix://{path}")
    with pytest.raises(ManagerUnreachable) as caught:
        client.healthz()
    client.close()
    thread.join()
    listener.close()
    assert words in str(caught.value)


def test_a_manager_that_hangs_is_given_up(short_tmp):
    path = short_tmp / "x.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ManagerUnreachable) as caught:
            ManagerClient(f"unix://{path}", timeout=0.2).healthz()
    assert "timed out" in caught.value.why


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("ftp://host", {}, "not the address"),
        ("https://", {}, "not the address"),
        ("https://host:99999", {}, "not the address"),
        ("https://host/path", {}, "not the address"),
        ("https://user:secret@host", {}, "not the address"),
        ("unix://", {}, "not the address"),
        ("http://127.0.0.1:1", {}, "without TLS"),
        ("http://192.0.2.1:1", {"ssl": False}, "unencrypted"),
        ("http://manager.example.org:1", {"ssl": False}, "unencrypted"),
        ("https://127.0.0.1:1", {"ssl": False}, "--no-ssl"),
        ("https://host", {"fingerprint": "12:34"}, "not a fingerprint"),
        ("https://host", {"ca_file": "/nonexistent"}, "Cannot use the certificate"),
        ("https://host", {"cert_file": "/nonexistent"}, "Cannot use the certificate"),
        ("https://host", {"token": "two\nlines"}, "token"),
        ("https://host", {"token": ""}, "token"),
    ],
)
def test_addresses_and_credentials_that_cannot_be_are_said(url, options, words):
    with pytest.raises(BadRequest) as caught:
        Transport(url, **options)
    assert words in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    "head",
    [
        b"GET /agents HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET agents HTTP/1.1\r\nHost: x\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"POST /agents HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /agents HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        b"POST /agents HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n{",
    ],
)
def test_requests_that_are_none_end_alone(manager, admin, head):
    answer = raw(manager.paths.manager_socket, head)
    assert b"HTTP/1.1 200" not in answer
    assert b"Traceback" not in answer
    assert admin.agents() == {"agents": []}


def test_what_the_server_refuses_by_itself_is_a_problem_document(manager):
    head = (
        b"POST /agents HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999\r\n\r\n"
    )
    answer = raw(manager.paths.manager_socket, head)
    top, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in top
    assert b"Connection: close" in top
    assert json.loads(body)["status"] == 413


def test_a_body_of_ten_megabytes_costs_nothing_and_the_refusal_arrives(manager, admin):
    connection = UnixConnection(manager.paths.manager_socket)
    body = json.dumps({"name": "x" * 10_000_000})
    connection.request("POST", "/agents", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 413
    assert "65536 bytes" in json.load(response)["detail"]
    connection.close()
    assert admin.agents() == {"agents": []}


def test_many_silent_connections_hold_nobody_up(manager, admin):
    idle = []
    for _ in range(200):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(manager.paths.manager_socket))
        idle.append(sock)
    began = time.monotonic()
    assert admin.agents() == {"agents": []}
    assert time.monotonic() - began < 2
    for sock in idle:
        sock.close()


def test_half_requests_hold_no_thread_and_are_let_go(manager, monkeypatch):
    monkeypatch.setattr(wsgi_server, "PATIENCE", 1.0)
    slow = []
    for _ in range(100):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(str(manager.paths.manager_socket))
        sock.sendall(b"GET /agents HTTP/1.1\r\nHost:")
        slow.append(sock)
    with client_of(manager) as admin:
        began = time.monotonic()
        assert admin.agents() == {"agents": []}
        assert time.monotonic() - began < 1
    for sock in slow:
        assert sock.recv(65536) == b""
        sock.close()


def test_two_requests_in_one_packet_are_answered_in_order(manager):
    request = (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /agents HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    _, first, second = raw(manager.paths.manager_socket, request).split(b"HTTP/1.1 200 ")
    assert b'"feed_connections"' in first
    assert b'{"agents":[]}' in second


def test_the_answer_to_head_has_the_length_of_the_answer_to_get(manager):
    request = b"%b /agents HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    head, _, body = raw(manager.paths.manager_socket, request % b"HEAD").partition(b"\r\n\r\n")
    assert body == b""
    assert b"Content-Length: 13\r\n" in head + b"\r\n"
    assert len(raw(manager.paths.manager_socket, request % b"GET").partition(b"\r\n\r\n")[2]) == 13


def test_a_body_in_chunks_and_one_that_waits_for_100(manager):
    body = json.dumps({"name": "alice", "password": "correct horse"}).encode()
    head = b"POST /agents HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    assert raw(manager.paths.manager_socket, head + chunked).startswith(b"HTTP/1.1 201 ")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(manager.paths.manager_socket))
        sock.sendall(head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert sock.recv(65536).startswith(b"HTTP/1.1 100 ")
        sock.sendall(body)
        assert sock.recv(65536).startswith(b"HTTP/1.1 409 ")


def test_an_end_of_the_manager_ends_waiting_requests(short_tmp, monkeypatch):
    with manager_in(short_tmp, monkeypatch) as manager:
        manager.supervisor.settle = False
        with client_of(manager) as admin:
            admin.create_agent("alice", "correct horse")
            answers = []
            thread = threading.Thread(target=lambda: answers.append(admin.set_state("alice", "running", wait=60)))
            thread.start()
            until("it waits", lambda: manager.services.waiting._value < manager.config.manager.threads // 2)
            began = time.monotonic()
            manager.close()
            thread.join(10)
            assert time.monotonic() - began < 5
            assert answers[0]["desired"] == "running"


def test_health_tells_of_a_backend_that_is_down_and_stays_200(manager, admin):
    manager.supervisor.down = "The engine does not answer"
    health = admin.healthz()
    assert health["status"] == "degraded"
    assert "engine does not answer" in health["problems"][0]
    assert health["feed_connections"] == 0


def as_user(uid, gid, work):
    """Return what `work` returns, done by another user in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            result = work()
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writer, str(result).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    text = os.read(reader, 65536).decode()
    os.close(reader)
    return text


@pytest.mark.root
@pytest.mark.parametrize("which", ["manager_socket", "proxy_socket"])
def test_other_users_cannot_connect_and_are_refused_by_the_second_check(manager, which):
    path = getattr(manager.paths, which)

    def ask():
        return ManagerClient(f"unix://{path}").healthz()

    assert "ManagerUnreachable" in as_user(54321, 54321, ask)
    path.chmod(0o666)
    assert "You may not use this socket" in as_user(54321, 54321, ask)


@pytest.mark.root
def test_the_proxys_user_has_the_proxys_role_and_no_more(manager, admin):
    accounts = manager.accounts
    admin.create_agent("alice", "correct horse")

    def role(which):
        return lambda: ManagerClient(f"unix://{getattr(manager.paths, which)}").healthz()["status"]

    assert as_user(accounts.proxy_uid, accounts.proxy_gid, role("proxy_socket")) == "ok"
    assert "ManagerUnreachable" in as_user(accounts.proxy_uid, accounts.proxy_gid, role("manager_socket"))
    manager.paths.manager_socket.chmod(0o666)
    assert "You may not use" in as_user(accounts.proxy_uid, accounts.proxy_gid, role("manager_socket"))
