"""The demo app: what it keeps, what it answers over a real socket, and how it treats clients that misbehave."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import unix_connect

from dispatcher.demo import app as demo_app
from dispatcher.demo.__main__ import MAX_THREADS, HttpServer, arguments
from dispatcher.demo.app import create_app
from dispatcher.demo.storage import Files, Notes, StorageError, file_name

HEAD = "Host: demo\r\nX-Dispatcher-User: alice\r\n"
HANDSHAKE = (
    f"GET /clock HTTP/1.1\r\n{HEAD}Upgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@contextlib.contextmanager
def running(directory: Path):
    """The app on a Unix socket; yields its path."""
    app = create_app(directory / "data")
    path = directory / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = HttpServer(listener, app)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield path
    finally:
        server.shutdown()
        thread.join()
        app.extensions["clocks"].close()
        end = time.monotonic() + 5
        while server.busy and time.monotonic() < end:
            time.sleep(0.01)
        path.unlink()
    assert not server.busy


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(path))
    return client


def read(client: socket.socket, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """One response."""
    answer = http.client.HTTPResponse(client, method=method)
    answer.begin()
    with answer:
        fields = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, fields, answer.read()


def receive(client: socket.socket, enough=lambda data: False) -> bytes:
    """Return what arrives until it is enough, or the end."""
    data = b""
    while not enough(data) and (piece := client.recv(65536)):
        data += piece
    return data


def until(check) -> None:
    end = time.monotonic() + 10
    while not check():
        assert time.monotonic() < end
        time.sleep(0.02)


def ask(path: Path, method: str, target: str, body: bytes = b"", fields: str = ""):
    """One request on a connection of its own."""
    with connect(path) as client:
        head = f"{method} {target} HTTP/1.1\r\n{HEAD}{fields}Content-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        return read(client, method)


def test_notes_survive_and_are_seen_newest_first(tmp_path: Path) -> None:
    with running(tmp_path) as path:
        for text in ("first", "<b>second</b> é"):
            status, _, body = ask(path, "POST", "/notes", json.dumps({"text": text}).encode())
            assert status == 201, body
    with running(tmp_path) as path:
        _, fields, body = ask(path, "GET", "/notes")
        notes = json.loads(body)["notes"]
        assert [note["text"] for note in notes] == ["<b>second</b> é", "first"]
        assert fields["cache-control"] == "no-store"
        assert ask(path, "DELETE", f"/notes/{notes[0]['id']}")[0] == 204
        assert ask(path, "DELETE", f"/notes/{notes[0]['id']}")[0] == 404
        exported = ask(path, "GET", "/notes.md")[2].decode()
        assert "first" in exported
        assert "second" not in exported


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"text": "  "}', 400),
        (b'{"text": "\\ud800"}', 400),
        (b"[" * 60_000, 400),
        (json.dumps({"text": "x" * 10_001}).encode(), 400),
        (b"x" * 100_000, 413),
    ],
    ids=["empty", "cut", "list", "blank", "surrogate", "deep", "long", "too large"],
)
def test_bad_notes_are_refused_and_nothing_is_kept(tmp_path: Path, body: bytes, status: int) -> None:
    with running(tmp_path) as path:
        assert ask(path, "POST", "/notes", body)[0] == status
        assert json.loads(ask(path, "GET", "/notes")[2]) == {"notes": []}


def test_a_damaged_file_is_reported_and_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{oops")
    with pytest.raises(StorageError, match=r"notes\.json is damaged"):
        Notes(tmp_path).add("new")
    assert (tmp_path / "notes.json").read_text() == "{oops"


def test_too_many_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatcher.demo.storage.MAX_NOTES", 1)
    notes = Notes(tmp_path)
    notes.add("one")
    with pytest.raises(StorageError) as caught:
        notes.add("two")
    assert caught.value.status == 409
    assert [note.text for note in notes.all()] == ["one"]


def test_upload_and_download_are_the_same_bytes(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)

    with running(tmp_path) as path:
        assert ask(path, "PUT", "/files/a%20b%C3%A9.bin", data)[0] == 201
        listed = json.loads(ask(path, "GET", "/files")[2])["files"]
        assert [(item["name"], item["size"]) for item in listed] == [("a bé.bin", len(data))]
        status, fields, body = ask(path, "GET", "/files/a%20b%C3%A9.bin")
        assert (status, body == data) == (200, True)
        assert fields["content-disposition"].endswith("filename*=UTF-8''a%20b%C3%A9.bin")
        assert fields["x-content-type-options"] == "nosniff"
        assert fields["content-security-policy"] == "sandbox; default-src 'none'"
        assert fields["cache-control"] == "no-store"
        status, fields, body = ask(path, "GET", "/files/a%20b%C3%A9.bin", fields="Range: bytes=10-19\r\n")
        assert (status, body, fields["content-range"]) == (206, data[10:20], f"bytes 10-19/{len(data)}")
        assert ask(path, "GET", "/files/a%20b%C3%A9.bin", fields="Range: bytes=9999999-\r\n")[0] == 416
        head = ask(path, "HEAD", "/files/a%20b%C3%A9.bin")
        assert head[1]["content-length"] == str(len(data))
        assert ask(path, "DELETE", "/files/a%20b%C3%A9.bin")[0] == 204
        assert ask(path, "GET", "/files/a%20b%C3%A9.bin")[0] == 404


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with running(tmp_path) as path:
        ask(path, "PUT", "/files/x", b"old")
        with connect(path) as client:
            client.sendall(f"PUT /files/x HTTP/1.1\r\n{HEAD}Content-Length: 1000\r\n\r\nhalf".encode())
            time.sleep(0.05)
        until(lambda: os.listdir(tmp_path / "data/files") == ["x"])
        assert ask(path, "GET", "/files/x")[2] == b"old"


def test_left_over_uploads_of_a_killed_app_are_removed(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/.upload-1").write_text("half")
    Files(tmp_path)
    assert not os.listdir(tmp_path / "files")


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", ".hidden", "a/b", "a\\b", "a\0b", "a\nb", "x" * 151, "é" * 80, "a\u202eb", "\ud800"],
)
def test_bad_file_names(name: str) -> None:
    with pytest.raises(StorageError):
        file_name(name)


@pytest.mark.parametrize("target", ["/files/..%2f..%2fetc%2fpasswd", "/files/%2e%2e", "/files/../notes.json"])
def test_no_path_leads_out_of_the_folder(tmp_path: Path, target: str) -> None:
    with running(tmp_path) as path:
        ask(path, "POST", "/notes", b'{"text": "secret"}')
        status, _, body = ask(path, "GET", target)
        assert status in {400, 404}
        assert b"secret" not in body


def test_a_link_in_the_folder_is_neither_listed_nor_followed(tmp_path: Path) -> None:
    files = Files(tmp_path)
    (tmp_path / "files/link").symlink_to("/etc/hostname")
    assert files.all() == []
    with pytest.raises(StorageError):
        files.path("link")


def test_it_shows_whom_it_serves_and_since_when(tmp_path: Path) -> None:
    with running(tmp_path) as path:
        facts = json.loads(ask(path, "GET", "/about")[2])
        assert facts["user"] == "alice"
        assert facts["since"] > 1e9
        assert ["x-dispatcher-user", "alice"] in facts["headers"]
        status, fields, body = ask(path, "GET", "/")
        assert (status, fields["content-type"]) == (200, "text/html; charset=utf-8")
        assert b"Notebook" in body
        assert "default-src 'self'" in fields["content-security-policy"]
        for name in ("demo.css", "demo.js"):
            assert ask(path, "GET", f"/{name}")[0] == 200
        assert ask(path, "GET", "/nothing")[0] == 404


@pytest.mark.parametrize(("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 201)])
def test_pages_of_other_origins_change_nothing(tmp_path: Path, site: str, status: int) -> None:
    with running(tmp_path) as path:
        fields = f"Sec-Fetch-Site: {site}\r\n"
        assert ask(path, "POST", "/notes", b'{"text": "x"}', fields)[0] == status


def test_the_clock_ticks_and_answers_pings(tmp_path: Path) -> None:
    with running(tmp_path) as path, unix_connect(str(path), "ws://demo/clock") as client:
        first, second, third = (json.loads(client.recv(5)) for _ in range(3))
        assert 0 < second["now"] - first["now"] < 1.5
        assert third["up"] > first["up"]  # the second may follow at once, at the next full second
        assert client.ping().wait(2)
        client.send("hello")
        client.close()
        assert client.close_code == 1000


def test_a_plain_request_for_the_clock_is_told_to_upgrade(tmp_path: Path) -> None:
    with running(tmp_path) as path:
        assert ask(path, "GET", "/clock")[0] == 426
        old = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 8\r\nSec-WebSocket-Key: x\r\n"
        status, fields, _ = ask(path, "GET", "/clock", fields=old)
        assert (status, fields["sec-websocket-version"]) == (426, "13")
        assert ask(path, "GET", "/health", fields="Upgrade: h2c\r\nConnection: Upgrade\r\n")[0] == 200


def test_a_client_that_breaks_the_websocket_protocol_is_told_why(tmp_path: Path) -> None:
    with running(tmp_path) as path, connect(path) as client:
        client.sendall(HANDSHAKE.encode())
        head = receive(client, lambda data: b"\r\n\r\n" in data)
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
        client.sendall(b"\x81\x04text")  # not masked (RFC 6455, section 5.1)
        assert b"\x03\xea" in receive(client)  # close code 1002


def test_nothing_follows_the_close_frame_after_a_message_that_is_too_big(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = demo_app.MAX_MESSAGE + 1

    def ask_too_much(path: Path) -> bytes:
        with connect(path) as client:
            client.sendall(HANDSHAKE.encode())
            receive(client, lambda data: b"\r\n\r\n" in data)
            client.sendall(b"\x82\xff" + size.to_bytes(8, "big") + bytes(4 + size))
            return receive(client)

    with running(tmp_path) as path, ThreadPoolExecutor(20) as threads:
        received = list(threads.map(ask_too_much, [path] * 100))
    frame = b"\x88\x14\x03\xf1Message is too big"  # close code 1009
    assert [one for one in received if not one.endswith(frame)] == []
    assert not caplog.records


def test_the_number_of_websockets_is_bounded(tmp_path: Path) -> None:
    with running(tmp_path) as path, contextlib.ExitStack() as stack:
        assert demo_app.MAX_CLOCKS < MAX_THREADS
        clients = [stack.enter_context(connect(path)) for _ in range(demo_app.MAX_CLOCKS)]
        for client in clients:
            client.sendall(HANDSHAKE.encode())
        for client in clients:
            receive(client, lambda data: b'"now"' in data)
        with connect(path) as client:
            client.sendall(HANDSHAKE.encode())
            assert read(client)[0] == 503
        assert ask(path, "GET", "/health")[0] == 200
        clients[0].close()
        until(lambda: can_tick(path))


def can_tick(path: Path) -> bool:
    with connect(path) as client:
        client.sendall(HANDSHAKE.encode())
        return read(client)[0] == 101


def test_more_connections_than_threads_wait_and_are_served(tmp_path: Path) -> None:
    with running(tmp_path) as path, contextlib.ExitStack() as stack:
        before = threading.active_count()
        idle = [stack.enter_context(connect(path)) for _ in range(MAX_THREADS)]
        with connect(path) as client:
            client.sendall(f"GET /health HTTP/1.1\r\n{HEAD}\r\n".encode())
            time.sleep(0.2)
            assert threading.active_count() <= before + MAX_THREADS
            idle[0].close()
            assert read(client)[0] == 200


def test_an_endless_head_is_cut_off(tmp_path: Path) -> None:
    with running(tmp_path) as path, connect(path) as client:
        client.sendall(b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 66_000)
        assert read(client)[0] == 431


def test_a_client_that_sends_a_refused_body_reads_why(tmp_path: Path) -> None:
    with running(tmp_path) as path:
        assert ask(path, "PUT", "/files/.bad", b"z" * 2_000_000)[0] == 400


def test_continue_is_sent_when_asked_for(tmp_path: Path) -> None:
    with running(tmp_path) as path, connect(path) as client:
        client.sendall(
            f"PUT /files/x HTTP/1.1\r\n{HEAD}Expect: 100-continue\r\nContent-Length: 3\r\n\r\n".encode()
        )
        assert receive(client, lambda data: data.endswith(b"\r\n\r\n")) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        assert read(client)[0] == 201


def test_the_data_directory_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPATCHER_DATA", "/somewhere")
    assert arguments(["--unix", "s"]).data == Path("/somewhere")
    monkeypatch.delenv("DISPATCHER_DATA")
    assert arguments(["--unix", "s"]).data == Path()


def test_the_program_starts_on_a_socket_for_its_group_and_stops_when_told(short_tmp: Path) -> None:
    path = short_tmp / "s"
    process = subprocess.Popen(
        [sys.executable, "-m", "dispatcher.demo", "--unix", str(path)],
        cwd=short_tmp,
        env={"PATH": os.environ["PATH"], "HOME": str(short_tmp)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert str(path) in process.stdout.readline()
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert ask(path, "POST", "/notes", b'{"text": "kept here"}')[0] == 201
        assert (short_tmp / "notes.json").exists()
        with unix_connect(str(path), "ws://demo/clock") as client:
            client.recv(5)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed):
                while True:
                    client.recv(5)
            assert client.close_code == 1001
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == 0
    assert not path.exists()


def test_it_says_in_one_line_why_it_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = subprocess.run(
        [sys.executable, "-m", "dispatcher.demo", "--port", "0", "--data", str(tmp_path / "file")],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("The demo app cannot start: ")
    assert result.stderr.count("\n") == 1
