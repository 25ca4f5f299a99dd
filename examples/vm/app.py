"""The example guest's app: notes on the data disk, a counter in memory, a live clock over a WebSocket.

Standard library only, one file.  The subset of HTTP/1.1 (RFC 9112) for a browser behind a proxy, WebSocket
(RFC 6455).  The counter shows that memory survives a suspension; the notes show that data survives the guest.

    app.py --tcp HOST:PORT
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import os
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs

DATA = Path(os.environ.get("DISPATCHER_DATA", "."))
NOTES = DATA / "notes.txt"
STARTED = time.time()
WEBSOCKET = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
LARGEST = 1 << 20

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Notes of {user}</title>
<style>body {{ font: 1rem/1.5 sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }}</style>
<h1>A machine for {user}</h1>
<p>Up for <output id="up">{up:.0f}</output> s; counted to <output id="count">{count}</output> in memory.</p>
<form method="post" action="count"><button>Count</button></form>
<form method="post" action="notes"><label>Note <input name="note" required></label> <button>Keep</button></form>
<ul id="notes">{notes}</ul>
<script>
const socket = new WebSocket(new URL("clock", location.href.replace(/^http/, "ws")));
socket.onmessage = (event) => {{ document.getElementById("up").textContent = event.data; }};
</script></html>
"""

count = 0


def answer(status: str, body: bytes, kind: str = "text/html; charset=utf-8", *extra: str) -> bytes:
    """Return a whole HTTP response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *extra, "", ""]
    return "\r\n".join(lines).encode() + body


def page() -> bytes:
    """Return the one page."""
    notes = NOTES.read_text(encoding="utf-8").splitlines() if NOTES.exists() else []
    user = html.escape(os.environ.get("DISPATCHER_USER", "nobody"))
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return PAGE.format(user=user, up=time.time() - STARTED, count=count, notes=items).encode()


def respond(method: str, path: str, body: bytes) -> bytes:
    """Answer one request that is no upgrade."""
    global count
    if (method, path) == ("GET", "/"):
        return answer("200 OK", page())
    if path == "/count":
        count += method == "POST"
        if method == "POST":
            return answer("303 See Other", f"{count}\n".encode(), "text/plain", "Location: .")
        return answer("200 OK", f"{count}\n".encode(), "text/plain")
    if (method, path) == ("POST", "/notes"):
        note = parse_qs(body.decode("utf-8", "replace")).get("note", [""])[0]
        with NOTES.open("a", encoding="utf-8") as file:
            file.write(" ".join(note.split()) + "\n")
        return answer("303 See Other", b"", "text/plain", "Location: .")
    return answer("404 Not Found", b"Not found\n", "text/plain")


def frame(opcode: int, payload: bytes) -> bytes:
    """Return an unmasked, final WebSocket frame (RFC 6455, section 5.2)."""
    head = bytes([0x80 | opcode])
    if len(payload) < 126:
        return head + bytes([len(payload)]) + payload
    if len(payload) < 65536:
        return head + b"\x7e" + len(payload).to_bytes(2, "big") + payload
    return head + b"\x7f" + len(payload).to_bytes(8, "big") + payload


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Return opcode and payload of a client's frame, which is masked."""
    first, second = await reader.readexactly(2)
    length = second & 0x7F
    if length >= 126:
        length = int.from_bytes(await reader.readexactly(2 if length == 126 else 8), "big")
    if length > LARGEST or not second & 0x80:
        raise ValueError("frame too large, or not masked")
    mask = await reader.readexactly(4)
    payload = await reader.readexactly(length)
    key = (mask * (length // 4 + 1))[:length]
    unmasked = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")
    return first & 0x0F, unmasked.to_bytes(length, "big")


async def websocket(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send the time since the start every second on `/clock`; echo messages on every path."""

    async def clock() -> None:
        while True:
            writer.write(frame(1, f"{time.time() - STARTED:.0f}".encode()))
            await writer.drain()
            await asyncio.sleep(1)

    ticking = asyncio.ensure_future(clock()) if path == "/clock" else None
    try:
        while True:
            opcode, payload = await read_frame(reader)
            if opcode == 8:
                writer.write(frame(8, payload[:2]))
                return
            if opcode in (0, 1, 2, 9):
                writer.write(frame(10 if opcode == 9 else opcode, payload))
            await writer.drain()
    finally:
        if ticking:
            ticking.cancel()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Speak with one client until it goes."""
    try:
        while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n"):
            method, target, _ = head[0].split(" ", 2)
            path = target.partition("?")[0]
            fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            if fields.get("upgrade", "").lower() == "websocket":
                key = hashlib.sha1(fields["sec-websocket-key"].encode() + WEBSOCKET).digest()
                accept = base64.b64encode(key).decode()
                writer.write(
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
                )
                await websocket(path, reader, writer)
                return
            length = int(fields.get("content-length", "0"))
            body = await reader.readexactly(length) if 0 <= length <= LARGEST else b""
            writer.write(respond(method, path, body))
            await writer.drain()
            if fields.get("connection", "").lower() == "close":
                return
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ValueError, KeyError):
        pass
    finally:
        writer.close()


async def main(address: str) -> None:
    """Serve until SIGTERM."""
    host, _, port = address.rpartition(":")
    server = await asyncio.start_server(serve, host, int(port))
    print(f"listening on {address}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[sys.argv.index("--tcp") + 1]))
