"""The proxy daemon as a process: privileges, restarts, reload, drain, listeners, TLS."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from cryptography import x509

from dispatcher.cli.serve import proxy_process
from tests.support.edge_daemon import ROOT, Daemon, free_port, status, user_ids
from tests.support.edge_harness import COOKIE, TOKEN, Connection, Reader, eventually, read_all

HOST = b"Host: app.test\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + COOKIE + b"\r\n"
UPGRADE = b"GET /ws HTTP/1.1\r\n" + HOST + COOKIE + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


def get(sock: socket.socket, request: bytes = GET) -> int:
    sock.sendall(request)
    return Reader(sock).answer().status


@pytest.fixture(scope="module")
def daemon():
    with Daemon() as daemon:
        yield daemon


def test_agent_and_portal_answer(daemon):
    with daemon.connect() as sock:
        assert get(sock) == 200
        assert get(sock, b"GET /auth/login HTTP/1.1\r\n" + HOST + b"Accept: text/html\r\n\r\n") == 200


@pytest.mark.root
def test_no_process_of_the_proxy_keeps_a_privilege(daemon):
    pids = [daemon.process.pid, *(child.pid for child in daemon.children())]
    assert len(pids) == 3
    for pid in pids:
        assert 0 not in user_ids(pid)
        facts = status(pid)
        assert facts["NoNewPrivs"] == "1"
        assert int(facts["CapPrm"], 16) == int(facts["CapEff"], 16) == int(facts["CapAmb"], 16) == 0
        assert len(facts["Groups"].split()) == 1 and facts["Groups"] == facts["Gid"].split()[0]


def test_the_proxy_is_found_by_its_lock_and_hides_its_portal(daemon):
    assert proxy_process(daemon.dir) == (daemon.process.pid, int(status(daemon.process.pid)["Uid"].split()[0]))
    assert (daemon.dir / "proxy").stat().st_mode & 0o777 == 0o700


def test_a_worker_that_is_killed_comes_back(daemon):
    (worker,) = daemon.workers()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: daemon.workers() not in ([], [worker]), 10)
    with daemon.connect() as sock:
        assert get(sock) == 200
    portal = next(child.pid for child in daemon.children() if child.pid not in daemon.workers())
    os.kill(portal, signal.SIGKILL)
    eventually(lambda: len(daemon.children()) == 2 and portal not in [c.pid for c in daemon.children()], 10)
    with daemon.connect() as sock:
        assert get(sock, b"GET /auth/login HTTP/1.1\r\n" + HOST + b"\r\n") == 200


class Load:
    """Requests without an end from some threads; `failed` says what went wrong."""

    def __init__(self, daemon: Daemon, threads: int = 4) -> None:
        self.failed: list[str] = []
        self.done = 0
        self._daemon = daemon
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(n % 2 == 0,), daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, keep: bool) -> None:
        request = GET if keep else GET[:-2] + b"Connection: close\r\n\r\n"
        sock = None
        while not self._stop.is_set():
            try:
                if sock is None:
                    sock = self._daemon.connect(5)
                sock.sendall(request)
                answer = Reader(sock).answer()
                if answer.status != 200:
                    self.failed.append(f"status {answer.status}")
                self.done += 1
                if answer.field(b"connection") == b"close":
                    sock.close()
                    sock = None
            except (OSError, AssertionError, ValueError, RuntimeError) as error:
                self.failed.append(repr(error))
                sock = None
        if sock is not None:
            sock.close()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)


def test_no_request_fails_over_reloads_under_load():
    with Daemon(workers=2, drain_timeout=5) as daemon:
        load = Load(daemon)
        for _ in range(3):
            before = set(daemon.workers())
            daemon.signal(signal.SIGHUP)
            eventually(
                lambda before=before: (
                    len(set(daemon.workers()) - before) == 2 and not set(daemon.workers()) & before
                ),
                20,
            )
        load.stop()
        assert not load.failed and load.done > 100
        assert len(daemon.children()) == 3


def test_a_reload_takes_a_new_configuration_and_refuses_a_wrong_one():
    with Daemon(access_log="") as daemon:
        second = free_port()
        daemon.write(listen=[f"127.0.0.1:{daemon.port}", f"127.0.0.1:{second}"], prefix="/portal")
        before = daemon.workers()
        daemon.signal(signal.SIGHUP)
        eventually(lambda: daemon.workers() and not set(daemon.workers()) & set(before), 15)
        with socket.create_connection(("127.0.0.1", second), 5) as sock:
            assert get(sock, b"GET /portal/login HTTP/1.1\r\n" + HOST + b"\r\n") == 200
        daemon.write(workers=0)
        before = daemon.workers()
        daemon.signal(signal.SIGHUP)
        eventually(lambda: daemon.said("the new configuration is not applied"))
        daemon.write(workers=1, listen=[f"127.0.0.1:{second}"])
        daemon.signal(signal.SIGHUP)
        eventually(lambda: daemon.workers() and not set(daemon.workers()) & set(before), 15)
        with pytest.raises(ConnectionRefusedError):
            daemon.connect()
        with socket.create_connection(("127.0.0.1", second), 5) as sock:
            assert get(sock) == 200


def slow(connection: Connection) -> None:
    head = connection.head()
    if b"/ws" in head:
        connection.send(SWITCH)
        while data := connection.sock.recv(1000):
            connection.send(data)
        return
    connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
    time.sleep(1.5)
    connection.send(b"world")


def test_stopping_finishes_what_is_under_way():
    with Daemon(slow, drain_timeout=6) as daemon:
        with daemon.connect() as download, daemon.connect() as websocket, daemon.connect() as idle:
            idle.sendall(b"\r\n")  # nothing yet, but the kernel hands a connection over with its first bytes
            download.sendall(GET)
            websocket.sendall(UPGRADE)
            assert websocket.recv(1000).startswith(b"HTTP/1.1 101")
            eventually(lambda: len(daemon.agent.heads) == 2)
            start = time.monotonic()
            daemon.signal(signal.SIGTERM)
            assert read_all(websocket) == b"\x88\x02\x03\xe9"
            assert read_all(download).endswith(b"helloworld")
            assert read_all(idle) == b""
            assert daemon.process.wait(10) == 0
            assert 1 < time.monotonic() - start < 6
        assert not (daemon.dir / "proxy/portal.sock").exists()
        assert proxy_process(daemon.dir) is None
        with pytest.raises(ConnectionRefusedError):
            daemon.connect()


def test_a_reload_lets_a_websocket_and_a_download_finish():
    with Daemon(slow, drain_timeout=4) as daemon, daemon.connect() as websocket, daemon.connect() as download:
        websocket.sendall(UPGRADE)
        assert websocket.recv(1000).startswith(b"HTTP/1.1 101")
        download.sendall(GET)
        eventually(lambda: len(daemon.agent.heads) == 2)
        before = daemon.workers()
        daemon.signal(signal.SIGHUP)
        eventually(lambda: set(daemon.workers()) - set(before), 15)
        assert Reader(download).answer().body == b"helloworld"
        websocket.sendall(b"\x81\x80\0\0\0\0")
        assert websocket.recv(100) == b"\x81\x80\0\0\0\0", "still open"
        assert read_all(websocket) == b"\x88\x02\x03\xe9", "until the time to drain is over"
        eventually(lambda: not set(daemon.workers()) & set(before), 10)


def test_a_second_signal_stops_at_once():
    with Daemon(slow, drain_timeout=30) as daemon, daemon.connect() as sock:
        sock.sendall(GET)
        eventually(lambda: daemon.agent.heads)
        daemon.signal(signal.SIGTERM)
        eventually(lambda: daemon.said("stopping"))
        daemon.signal(signal.SIGTERM)
        daemon.process.wait(5)


def test_a_killed_parent_takes_its_children_along_and_the_next_one_starts():
    with Daemon() as daemon:
        children = daemon.children()
        daemon.process.kill()
        daemon.process.wait()
        daemon.start()
        with daemon.connect() as sock:
            assert get(sock) == 200, "the first request finds its session"
        eventually(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), 10)


def test_two_proxies_on_one_address():
    with Daemon() as daemon:
        result = subprocess.run(daemon.process.args, capture_output=True, text=True, timeout=30, check=False)
        assert (
            result.returncode == 1
            and "Cannot listen on" in result.stderr
            and "stop what listens there" in result.stderr
        )


@pytest.mark.parametrize("proxy,words", [
    ({"listen": ["nonsense"]}, "proxy.listen"), ({"listen": ["::1:80"]}, "proxy.listen"), ({"listen": ["systemd"]}, "systemd passes no socket"),
    ({"lisen": ["127.0.0.1:1"]}, "did you mean 'listen'?"), ({"tls_cert": "/nowhere", "tls_key": "/nowhere"}, "proxy.tls_cert"),
    ({"trusted_proxies": ["x"]}, "trusted_proxies"), ({"listen": ["unix:relative"]}, "unix:/PATH"),
])  # fmt: skip
def test_bad_configuration_is_one_clear_error(proxy, words):
    with Daemon(start=False, **proxy) as daemon:
        daemon.start(wait=False)
        assert daemon.process.wait(20) in {1, 2}
        assert words in daemon.text() and "Traceback" not in daemon.text()


def test_an_access_log_that_cannot_be_opened_keeps_nobody_out():
    with Daemon(access_log="/nowhere/log") as daemon:
        with socket.create_connection(("127.0.0.1", daemon.port), 5) as sock:
            assert get(sock) == 200
        assert (
            "requests are not logged" in daemon.text()
            and "Cannot open the access log /nowhere/log" in daemon.text()
        )


@pytest.mark.parametrize("target", ["pipe", "-"])
def test_an_access_log_whose_reader_stops_holds_up_nobody(tmp_path, target):
    """Writing to a full pipe waits, and with it all that one worker serves; here after about ten requests."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    with Daemon(start=False, access_log="-" if target == "-" else str(pipe)) as daemon:
        daemon.start(stdout=writer)
        end = time.monotonic() + 2.5
        while time.monotonic() < end:  # it is written once a second
            with daemon.connect(3) as sock:
                assert get(sock) == 200
            time.sleep(0.02)
        lines = read_while(reader, lambda data: data.count(b"\n") > 40)
        assert all(json.loads(line)["status"] == 200 for line in lines.splitlines()[:40])
        assert pipe.stat().st_uid == os.geteuid(), "the pipe stays its maker's"
    os.close(reader)
    os.close(writer)


def read_while(reader: int, enough) -> bytes:
    found = bytearray()

    def more() -> bool:
        with contextlib.suppress(BlockingIOError):
            found.extend(os.read(reader, 65536))
        return enough(found)

    eventually(more, 20)
    return bytes(found)


def test_a_named_pipe_without_a_reader_keeps_nobody_out(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with Daemon(access_log=str(tmp_path / "pipe")) as daemon, daemon.connect() as sock:
        assert get(sock) == 200
        assert "nobody reads this named pipe" in daemon.text()


# Listeners.


def test_ipv6_unix_and_several_addresses():
    port = free_port("::1")
    with Daemon(start=False) as daemon:
        daemon.write(listen=[f"[::1]:{port}", f"unix:{daemon.dir}/web.sock", f"127.0.0.1:{daemon.port}"])
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(f"{daemon.dir}/web.sock")
        stale.close()
        daemon.start()
        with socket.create_connection(("::1", port), 5) as sock:
            sock.sendall(GET)
            assert b"X-Forwarded-For: ::1\r\n" in Reader(sock).answer().body
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(f"{daemon.dir}/web.sock")
            sock.sendall(GET)
            assert b"X-Forwarded-For: 127.0.0.1\r\n" in Reader(sock).answer().body


def test_socket_activation():
    with Daemon(start=False, listen=["systemd"]) as daemon, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        script = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec 3<&"$0"; exec "$@"'
        daemon.process = subprocess.Popen(
            ["bash", "-c", script, str(listener.fileno()), *_command(daemon)],
            pass_fds=[listener.fileno()], stdout=daemon.log, stderr=daemon.log, start_new_session=True, cwd=ROOT,
        )  # fmt: skip
        with socket.create_connection(listener.getsockname(), 20) as sock:
            assert get(sock) == 200


def _command(daemon: Daemon) -> list[str]:
    import sys

    from tests.support.edge_daemon import MAIN

    return [sys.executable, "-c", MAIN, str(daemon.dir / "dispatcher.toml")]


class ServiceManager:
    """systemd's part: gets notifications, keeps the descriptors of the service, and passes them to the next process."""

    def __init__(self, directory):
        self.path = str(directory / "notify")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.path)
        os.chmod(self.path, 0o777)
        self.sock.settimeout(20)
        self.stored = {}

    def next(self):
        """Return the next notification that is not about descriptors."""
        while True:
            data, fds, _, _ = socket.recv_fds(self.sock, 1000, 4)
            kind, _, rest = data.decode().partition("\n")
            name = rest.removeprefix("FDNAME=")
            if kind == "FDSTORE=1":
                (self.stored[name],) = fds
            elif kind == "FDSTOREREMOVE=1":
                os.close(self.stored.pop(name))
            else:
                return kind

    def start(self, daemon):
        names, fds = list(self.stored), list(self.stored.values())
        script = f"export LISTEN_PID=$$ LISTEN_FDS={len(fds)} LISTEN_FDNAMES='{':'.join(names)}'; exec \"$@\""
        script = "".join(f"exec {3 + at}<&{fd} {fd}<&-; " for at, fd in enumerate(fds)) + script
        daemon.process = subprocess.Popen(
            ["bash", "-c", script, "-", *_command(daemon)], pass_fds=fds, cwd=ROOT, start_new_session=True,
            stdout=daemon.log, stderr=daemon.log, env={**os.environ, "NOTIFY_SOCKET": self.path},
        )  # fmt: skip
        assert self.next() == "READY=1"

    def stop(self, daemon):
        daemon.signal(signal.SIGTERM)
        assert self.next() == "STOPPING=1"
        daemon.process.wait(20)

    def close(self):
        for fd in self.stored.values():
            os.close(fd)
        self.sock.close()


@pytest.fixture
def supervised():
    with Daemon(start=False) as daemon, contextlib.closing(ServiceManager(daemon.dir)) as manager:
        manager.start(daemon)
        yield daemon, manager


def test_systemd_is_told_when_it_is_ready(supervised):
    daemon, manager = supervised
    daemon.signal(signal.SIGHUP)
    assert manager.next() == "RELOADING=1" and manager.next() == "READY=1"
    manager.stop(daemon)


def test_a_restart_by_systemd_refuses_no_connection(supervised):
    daemon, manager = supervised
    manager.stop(daemon)
    with daemon.connect() as waits:
        manager.start(daemon)
        assert get(waits) == 200


def test_systemd_keeps_the_addresses_of_the_configuration_and_no_other(supervised):
    daemon, manager = supervised
    first, second = daemon.port, free_port()
    daemon.write(listen=[f"127.0.0.1:{second}"])
    daemon.signal(signal.SIGHUP)
    assert manager.next() == "RELOADING=1" and manager.next() == "READY=1"
    daemon.port = second
    assert len(manager.stored) == 1
    with daemon.connect() as sock:
        assert get(sock) == 200
    manager.stop(daemon)
    daemon.write(listen=[f"127.0.0.1:{first}"])
    daemon.port = first
    manager.start(daemon)
    assert len(manager.stored) == 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", second), 20)
    with daemon.connect() as sock:
        assert get(sock) == 200


def test_proxy_protocol_says_who_the_client_is():
    with Daemon(proxy_protocol=True) as daemon:
        header = (
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes([1, 2, 3, 4, 10, 0, 0, 1]) + struct.pack("!HH", 1, 2)
        )
        with daemon.connect() as sock:
            for byte in header:
                sock.sendall(bytes([byte]))
            sock.sendall(GET)
            assert b"X-Forwarded-For: 1.2.3.4\r\n" in Reader(sock).answer().body
        with daemon.connect(3) as sock:
            sock.sendall(GET)
            assert read_all(sock) == b"", "without a header nothing is served"


def test_trusted_proxies_are_believed_and_others_are_not():
    said = (
        GET[:-2]
        + b"X-Forwarded-For: 9.9.9.9, 1.2.3.4\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: apps.test\r\nX-Request-ID: mine-1\r\n\r\n"
    )
    with Daemon(trusted_proxies=["127.0.0.0/8"]) as daemon, daemon.connect() as sock:
        for address in (b"1.2.3.4", b"5.6.7.8"):
            sock.sendall(said.replace(b"1.2.3.4", address))
            body = Reader(sock).answer().body
            for line in (
                b"X-Forwarded-For: " + address,
                b"X-Forwarded-Proto: https",
                b"X-Forwarded-Host: apps.test",
                b"X-Request-ID: mine-1",
                b"Host: apps.test",
            ):
                assert body.count(b"\r\n" + line + b"\r\n") == 1, line


# TLS.


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from datetime import datetime, timedelta, timezone

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("app.test")]), critical=False).sign(key, hashes.SHA256())
    )  # fmt: skip
    cert, pem = directory / "cert.pem", directory / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    pem.chmod(0o644)
    return cert, pem


def tls(daemon: Daemon, **kw) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(kw.pop("alpn", ["h2", "http/1.1"]))
    for key, value in kw.items():
        setattr(context, key, value)
    return context.wrap_socket(daemon.connect(), server_hostname="app.test")


def flood_with_requests(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(100_000 * (b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"))


@pytest.mark.parametrize("kind", ["further requests", "further requests by TLS", "messages of TLS"])
def test_a_flood_on_one_connection_takes_turns_with_others(kind):
    """A stranger sends megabytes of small requests, or KeyUpdate messages, each of which needs an answer."""
    with Daemon(start=False) as daemon:
        if kind != "further requests":
            cert, key = certificate(daemon.dir, "flood")
            daemon.write(tls_cert=str(cert), tls_key=str(key))
        daemon.start()
        connect = daemon.connect if kind == "further requests" else lambda: tls(daemon)
        with contextlib.ExitStack() as stack:
            if kind == "messages of TLS":
                script = ROOT / "tests/support/tls_key_updates.py"
                command = [sys.executable, str(script), str(daemon.port), "10", "8"]
                flood = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
                stack.callback(flood.kill)
            else:
                sock = stack.enter_context(connect())
                threading.Thread(target=flood_with_requests, args=[sock], daemon=True).start()
            longest = 0.0
            for _ in range(20):
                time.sleep(0.2)
                start = time.monotonic()
                with connect() as other:
                    assert get(other, b"GET / HTTP/1.1\r\n" + HOST + b"\r\n") == 401
                longest = max(longest, time.monotonic() - start)
        assert longest < 2


@pytest.mark.parametrize("sender", ["agent", "client"])
def test_websockets_of_empty_frames_take_turns_with_others(sender):
    frames = 50_000 * (b"\x81\x00" if sender == "agent" else b"\x81\x80aaaa")

    def send(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(frames)

    def take(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while sock.recv(1 << 18):
                pass

    def agent(connection: Connection) -> None:
        if b"Upgrade: websocket" not in connection.head():
            return
        connection.send(SWITCH)
        (send if sender == "agent" else take)(connection.sock)

    with Daemon(agent) as daemon, contextlib.ExitStack() as stack:
        for _ in range(6):
            sock = stack.enter_context(daemon.connect())
            sock.sendall(UPGRADE)
            assert sock.recv(4096).startswith(b"HTTP/1.1 101 ")
            stack.callback(sock.shutdown, socket.SHUT_RDWR)
            threading.Thread(target=take if sender == "agent" else send, args=[sock], daemon=True).start()
        longest = 0.0
        for _ in range(10):
            time.sleep(0.1)
            start = time.monotonic()
            with daemon.connect() as other:
                assert get(other, b"GET / HTTP/1.1\r\n" + HOST + b"\r\n") == 401
            longest = max(longest, time.monotonic() - start)
        (worker,) = daemon.workers()
        assert longest < 2 and psutil.Process(worker).memory_info().rss < 200 << 20


def test_tls():
    plain = free_port()
    with Daemon(start=False, hsts="1h", redirect_listen=[f"127.0.0.1:{plain}"]) as daemon:
        cert, key = certificate(daemon.dir, "first")
        daemon.write(tls_cert=str(cert), tls_key=str(key))
        daemon.start()
        cookie = b"Cookie: __Host-dispatcher=" + TOKEN.encode() + b"\r\n"
        request = b"GET / HTTP/1.1\r\n" + HOST + cookie + b"\r\n"
        with tls(daemon) as sock:
            assert sock.selected_alpn_protocol() == "http/1.1" and sock.version() == "TLSv1.3"
            sock.sendall(request)
            answer = Reader(sock).answer()
            assert answer.status == 200 and answer.field(b"strict-transport-security") == b"max-age=3600"
            assert b"X-Forwarded-Proto: https\r\n" in answer.body and TOKEN.encode() not in answer.body
            # A cookie without the prefix is anybody's.
            sock.sendall(GET)
            assert Reader(sock).answer().status == 401
            # The certificate changes; the connection stays.
            before = sock.getpeercert(binary_form=True)
            certificate(daemon.dir, "second")
            workers = daemon.workers()
            daemon.signal(signal.SIGHUP)
            eventually(lambda: daemon.said("the new configuration is in use"), 15)
            assert set(daemon.workers()) - set(workers)
            sock.sendall(request)
            assert Reader(sock).answer().status == 200
        for _ in range(20):
            with tls(daemon) as sock:
                assert sock.getpeercert(binary_form=True) != before
        with tls(daemon, maximum_version=ssl.TLSVersion.TLSv1_2) as sock:
            assert sock.version() == "TLSv1.2"
        with pytest.raises((ssl.SSLError, OSError)), __import__("warnings").catch_warnings():
            __import__("warnings").simplefilter("ignore")
            tls(daemon, maximum_version=ssl.TLSVersion.TLSv1_1)
        with daemon.connect(3) as sock:
            sock.sendall(GET)
            read_all(sock)
        for start, expected in ((b"GET /a?b", 301), (b"POST /a?b", 308)):
            with socket.create_connection(("127.0.0.1", plain), 5) as sock:
                sock.sendall(start + b" HTTP/1.1\r\nHost: app.test:80\r\n\r\n")
                answer = Reader(sock).answer()
                assert answer.status == expected and answer.field(b"location") == b"https://app.test/a?b"
        # A big body through TLS, both ways.
        with tls(daemon) as sock:
            # The agent answers after the whole body, so no second thread has to read while this one sends.
            body = os.urandom(3_000_000)
            sock.sendall(b"POST / HTTP/1.1\r\n" + HOST + cookie + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert Reader(sock).answer().body.endswith(body)
        locked = ["openssl", "pkey", "-in", key, "-aes128", "-passout", "pass:secret", "-out", f"{key}.locked"]
        subprocess.run(locked, check=True)
        Path(f"{key}.locked").chmod(0o644)
        daemon.write(tls_key=f"{key}.locked")
        daemon.signal(signal.SIGHUP)
        eventually(lambda: daemon.said("has a passphrase"))
        daemon.write(tls_key=str(key))
        key.write_text("nonsense")
        daemon.signal(signal.SIGHUP)
        eventually(lambda: daemon.text().count("the new configuration is not applied") == 2)
        with tls(daemon) as sock, contextlib.suppress(OSError):
            sock.sendall(request)
            assert Reader(sock).answer().status == 200
