"""The demo app: what it keeps, what it answers over a real socket, and how it treats clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import websockets

from dispatcher.demo import websocket
from dispatcher.demo.__main__ import arguments
from dispatcher.demo.app import Demo, byte_range
from dispatcher.demo.server import Connection
from dispatcher.demo.storage import Files, Notes, StorageError, file_name

WRITERS: list[asyncio.StreamWriter] = []
HEAD = "Host: demo\r\nX-Dispatcher-User: alice\r\n"


@contextlib.asynccontextmanager
async def running(directory: Path):
    """The app on a Unix socket; yields its path."""
    demo = Demo(directory / "data")
    connections: set[Connection] = set()
    path = directory / "s"
    server = await asyncio.get_running_loop().create_unix_server(
        lambda: Connection(demo.handle, connections), str(path)
    )
    try:
        yield path
    finally:
        server.close()
        for connection in list(connections):
            connection.shut_down()
        while WRITERS:
            writer = WRITERS.pop()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that `running` closes."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    WRITERS.append(writer)
    return reader, writer


async def read(reader: asyncio.StreamReader, *, head_only: bool = False) -> tuple[int, dict[str, str], bytes]:
    """One response."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    status, *lines = head.strip().split("\r\n")
    fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    length = 0 if head_only else int(fields.get("content-length", 0))
    return int(status.split()[1]), fields, await reader.readexactly(length)


async def ask(path: Path, method: str, target: str, body: bytes = b"", fields: str = "", expect_body: bool = True):
    """One request on a connection of its own."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(
        f"{method} {target} HTTP/1.1\r\n{HEAD}{fields}Content-Length: {len(body)}\r\n\r\n".encode() + body
    )
    answer = await read(reader, head_only=not expect_body)
    writer.close()
    await writer.wait_closed()
    return answer


def test_notes_survive_and_are_seen_newest_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path:
            for text in ("first", "<b>second</b> é"):
                status, _, body = await ask(path, "POST", "/notes", json.dumps({"text": text}).encode())
                assert status == 201, body
        async with running(tmp_path) as path:
            _, fields, body = await ask(path, "GET", "/notes")
            notes = json.loads(body)["notes"]
            assert [note["text"] for note in notes] == ["<b>second</b> é", "first"]
            assert fields["cache-control"] == "no-store"
            assert (await ask(path, "DELETE", f"/notes/{notes[0]['id']}"))[0] == 204
            assert (await ask(path, "DELETE", f"/notes/{notes[0]['id']}"))[0] == 404
            exported = (await ask(path, "GET", "/notes.md"))[2].decode()
            assert "first" in exported
            assert "second" not in exported

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"text": "  "}', 400),
        (json.dumps({"text": "x" * 10_001}).encode(), 400),
        (b"x" * 100_000, 413),
    ],
)
def test_bad_notes_are_refused_and_nothing_is_kept(tmp_path: Path, body: bytes, status: int) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path:
            assert (await ask(path, "POST", "/notes", body))[0] == status
            assert json.loads((await ask(path, "GET", "/notes"))[2]) == {"notes": []}

    asyncio.run(scenario())


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

    async def scenario() -> None:
        async with running(tmp_path) as path:
            assert (await ask(path, "PUT", "/files/a%20b%C3%A9.bin", data))[0] == 201
            listed = json.loads((await ask(path, "GET", "/files"))[2])["files"]
            assert [(item["name"], item["size"]) for item in listed] == [("a bé.bin", len(data))]
            status, fields, body = await ask(path, "GET", "/files/a%20b%C3%A9.bin")
            assert (status, body == data) == (200, True)
            assert fields["content-disposition"] == "attachment; filename*=UTF-8''a%20b%C3%A9.bin"
            assert fields["x-content-type-options"] == "nosniff"
            status, fields, body = await ask(
                path, "GET", "/files/a%20b%C3%A9.bin", fields="Range: bytes=10-19\r\n"
            )
            assert (status, body, fields["content-range"]) == (206, data[10:20], f"bytes 10-19/{len(data)}")
            head = await ask(path, "HEAD", "/files/a%20b%C3%A9.bin", expect_body=False)
            assert head[1]["content-length"] == str(len(data))
            assert (await ask(path, "DELETE", "/files/a%20b%C3%A9.bin"))[0] == 204
            assert (await ask(path, "GET", "/files/a%20b%C3%A9.bin"))[0] == 404

    asyncio.run(scenario())


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path:
            await ask(path, "PUT", "/files/x", b"old")
            _, writer = await connect(path)
            writer.write(f"PUT /files/x HTTP/1.1\r\n{HEAD}Content-Length: 1000\r\n\r\nhalf".encode())
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.close()
            await asyncio.sleep(0.05)
            assert (await ask(path, "GET", "/files/x"))[2] == b"old"
            assert os.listdir(tmp_path / "data/files") == ["x"]

    asyncio.run(scenario())


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
    async def scenario() -> None:
        async with running(tmp_path) as path:
            await ask(path, "POST", "/notes", b'{"text": "secret"}')
            status, _, body = await ask(path, "GET", target)
            assert status in {400, 404}
            assert b"secret" not in body

    asyncio.run(scenario())


def test_a_link_in_the_folder_is_neither_listed_nor_followed(tmp_path: Path) -> None:
    files = Files(tmp_path)
    (tmp_path / "files/link").symlink_to("/etc/hostname")
    assert files.all() == []
    with pytest.raises(StorageError):
        files.open("link")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("", None),
        ("bytes=0-4", (0, 5)),
        ("bytes=4-", (4, 6)),
        ("bytes=-3", (7, 3)),
        ("bytes=-30", (0, 10)),
        ("bytes=5-99", (5, 5)),
        ("bytes=5-2", None),
        ("bytes=0-1,3-4", None),
        ("bytes=a-b", None),
        ("items=0-1", None),
    ],
)
def test_ranges(asked: str, expected: tuple[int, int] | None) -> None:
    assert byte_range(asked, 10) == expected


def test_a_range_past_the_end() -> None:
    with pytest.raises(StorageError) as caught:
        byte_range("bytes=10-", 10)
    assert caught.value.status == 416


def test_it_shows_whom_it_serves_and_since_when(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path:
            facts = json.loads((await ask(path, "GET", "/about"))[2])
            assert facts["user"] == "alice"
            assert facts["since"] > 1e9
            assert ["x-dispatcher-user", "alice"] in facts["headers"]
            status, fields, body = await ask(path, "GET", "/")
            assert (status, fields["content-type"]) == (200, "text/html; charset=utf-8")
            assert b"Notebook" in body
            assert "default-src 'self'" in fields["content-security-policy"]
            for name in ("demo.css", "demo.js"):
                assert (await ask(path, "GET", f"/{name}"))[0] == 200
            assert (await ask(path, "GET", "/nothing"))[0] == 404

    asyncio.run(scenario())


@pytest.mark.parametrize(("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 201)])
def test_pages_of_other_origins_change_nothing(tmp_path: Path, site: str, status: int) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path:
            fields = f"Sec-Fetch-Site: {site}\r\n"
            assert (await ask(path, "POST", "/notes", b'{"text": "x"}', fields))[0] == status

    asyncio.run(scenario())


def test_the_clock_ticks_and_answers_pings(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path, websockets.unix_connect(str(path), "ws://demo/clock") as socket:
            first, second = json.loads(await socket.recv()), json.loads(await socket.recv())
            assert 0 < second["now"] - first["now"] < 1.5
            assert second["up"] > first["up"]
            await asyncio.wait_for(await socket.ping(), 2)
            await socket.send("hello")
            await socket.close()
            assert socket.close_code == 1000

    asyncio.run(scenario())


def test_a_plain_request_for_the_clock_is_told_to_upgrade(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path:
            assert (await ask(path, "GET", "/clock"))[0] == 426
            old = (
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 8\r\nSec-WebSocket-Key: x\r\n"
            )
            status, fields, _ = await ask(path, "GET", "/clock", fields=old)
            assert (status, fields["sec-websocket-version"]) == (426, "13")
            assert (await ask(path, "GET", "/health", fields="Upgrade: h2c\r\nConnection: Upgrade\r\n"))[0] == 200

    asyncio.run(scenario())


def test_a_client_that_breaks_the_websocket_protocol_is_told_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path:
            reader, writer = await connect(path)
            writer.write(
                f"GET /clock HTTP/1.1\r\n{HEAD}Upgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
                + websocket.encode(websocket.TEXT, b"not masked")
            )
            status, fields, _ = await read(reader)
            assert (status, fields["sec-websocket-accept"]) == (101, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
            rest = await asyncio.wait_for(reader.read(), 3)
            assert websocket.close_frame(1002, "frame of a client is not masked") in rest

    asyncio.run(scenario())


def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path:
            reader, writer = await connect(path)
            note = b'{"text": "one"}'
            writer.write(
                f"POST /notes HTTP/1.1\r\n{HEAD}Content-Length: {len(note)}\r\n\r\n".encode()
                + note
                + f"GET /notes HTTP/1.1\r\n{HEAD}\r\nGET /health HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n".encode()
            )
            assert (await read(reader))[0] == 201
            assert json.loads((await read(reader))[2])["notes"][0]["text"] == "one"
            assert (await read(reader))[1]["connection"] == "close"
            assert await reader.read() == b""

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "request_bytes",
    [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"],
)
def test_nonsense_gets_400_and_the_end(tmp_path: Path, request_bytes: bytes) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path:
            reader, writer = await connect(path)
            writer.write(request_bytes)
            assert (await read(reader))[0] == 400
            assert await reader.read() == b""

    asyncio.run(scenario())


def test_an_endless_head_is_cut_off(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path:
            reader, writer = await connect(path)
            writer.write(b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 200_000)
            assert (await read(reader))[0] == 400

    asyncio.run(scenario())


def test_a_refused_body_does_not_spoil_the_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path:
            reader, writer = await connect(path)
            body = b"z" * 2_000_000
            writer.write(f"PUT /files/.bad HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            writer.write(f"GET /health HTTP/1.1\r\n{HEAD}\r\n".encode())
            assert (await read(reader))[0] == 400
            assert (await read(reader))[0] == 200

    asyncio.run(scenario())


def test_continue_is_sent_when_asked_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as path:
            reader, writer = await connect(path)
            writer.write(
                f"PUT /files/x HTTP/1.1\r\n{HEAD}Expect: 100-continue\r\nContent-Length: 3\r\n\r\n".encode()
            )
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"abc")
            assert (await read(reader))[0] == 201

    asyncio.run(scenario())


class TestFrames:
    @staticmethod
    def masked(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
        frame = bytearray(websocket.encode(opcode, payload))
        if not final:
            frame[0] &= 0x7F
        frame[1] |= 0x80
        mask = b"\x01\x02\x03\x04"
        body = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
        return bytes(frame[: len(frame) - len(payload)]) + mask + body

    @pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
    def test_any_length_split_anywhere(self, size: int) -> None:
        data = self.masked(websocket.BINARY, bytes(size))
        for cut in {1, 2, 5, len(data) // 2, len(data) - 1}:
            decoder = websocket.Decoder()
            found = [*decoder.feed(data[:cut]), *decoder.feed(data[cut:])]
            assert found == [websocket.Message(websocket.BINARY, bytes(size))]

    def test_fragments_with_a_ping_between(self) -> None:
        data = (
            self.masked(websocket.TEXT, b"a", final=False)
            + self.masked(websocket.PING, b"p")
            + self.masked(websocket.CONTINUATION, b"b")
        )
        found = list(websocket.Decoder().feed(data))
        assert found == [websocket.Message(websocket.PING, b"p"), websocket.Message(websocket.TEXT, b"ab")]

    @pytest.mark.parametrize(
        ("data", "code"),
        [
            (b"\xc1\x80", 1002),
            (b"\x83\x80", 1002),
            (b"\x09\x80", 1002),
            (b"\x89\xfe", 1002),
            (b"\x80\x80\x00\x00\x00\x00", 1002),
            (b"\x82\xff\x00\x00\x00\x01\x00\x00\x00\x00", 1009),
        ],
    )
    def test_violations(self, data: bytes, code: int) -> None:
        with pytest.raises(websocket.ProtocolError) as caught:
            list(websocket.Decoder().feed(data))
        assert caught.value.code == code

    def test_text_must_be_utf_8(self) -> None:
        with pytest.raises(websocket.ProtocolError) as caught:
            list(websocket.Decoder().feed(self.masked(websocket.TEXT, b"\xff")))
        assert caught.value.code == 1007

    def test_many_fragments_are_bounded(self) -> None:
        decoder = websocket.Decoder(limit=10)
        with pytest.raises(websocket.ProtocolError) as caught:
            list(decoder.feed(self.masked(websocket.TEXT, b"123456", final=False)))
            list(decoder.feed(self.masked(websocket.CONTINUATION, b"123456")))
        assert caught.value.code == 1009


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
        assert asyncio.run(ask(path, "POST", "/notes", b'{"text": "kept here"}'))[0] == 201
        assert (short_tmp / "notes.json").exists()
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
