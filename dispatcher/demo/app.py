"""What the demo does: notes, files, a clock, and what it sees of the person it serves.  Touches its data only."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from dispatcher.demo.server import Request, Response, Socket
from dispatcher.demo.storage import MAX_NOTE, Files, Notes, StorageError

STATIC = {"index.html": "text/html", "demo.css": "text/css", "demo.js": "text/javascript"}
_POLICY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}
_CHUNK = 1 << 20


def answer(value: object, status: int = 200) -> Response:
    """Return a JSON answer that is not to be cached."""
    body = json.dumps(value, ensure_ascii=False).encode() + b"\n"
    return Response(status, {"Content-Type": "application/json", "Cache-Control": "no-store"}, body)


class Demo:
    """The app.

    :param directory: where it keeps everything.
    :param portal: path of the portal, for the link to sign out.
    """

    def __init__(self, directory: Path, portal: str = "/auth") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.notes = Notes(directory)
        self.files = Files(directory)
        self.portal = portal
        self.started = time.time()
        self._begun = time.monotonic()
        here = Path(__file__).parent / "static"
        self._static = {name: (here / name).read_bytes() for name in STATIC}

    async def handle(self, request: Request) -> Response:
        """Answer one request."""
        try:
            response = await self._route(request)
        except StorageError as error:
            response = answer({"error": str(error)}, error.status)
        response.headers = {**_POLICY, **response.headers}
        return response

    def user(self, request: Request) -> str:
        """Return whom the app serves, as whoever stands before it says."""
        return request.headers.get("x-dispatcher-user") or os.environ.get("DISPATCHER_USER", "")

    async def _route(self, request: Request) -> Response:
        first, _, rest = request.path.lstrip("/").partition("/")
        routes: dict[tuple[str, bool], Callable[[Request, str], Awaitable[Response]]] = {
            ("about", False): self._about,
            ("health", False): self._health,
            ("clock", False): self._clock,
            ("notes", False): self._notes,
            ("notes", True): self._note,
            ("notes.md", False): self._export,
            ("files", False): self._list,
            ("files", True): self._file,
        }
        if (route := routes.get((first, bool(rest)))) is not None:
            if request.method not in {"GET", "HEAD"} and not self._same_origin(request):
                return answer({"error": "A page of another origin may not change anything here"}, 403)
            return await route(request, rest)
        name = first or "index.html"
        if name in self._static and not rest and request.method in {"GET", "HEAD"}:
            kind = f"{STATIC[name]}; charset=utf-8"
            return Response(200, {"Content-Type": kind, "Cache-Control": "no-cache"}, self._static[name])
        return answer({"error": "There is no such page"}, 404)

    @staticmethod
    def _same_origin(request: Request) -> bool:
        return request.headers.get("sec-fetch-site", "none") in {"same-origin", "none"}

    async def _health(self, request: Request, _: str) -> Response:
        return answer({"status": "ok"})

    async def _about(self, request: Request, _: str) -> Response:
        return answer(
            {
                "user": self.user(request),
                "since": self.started,
                "portal": self.portal,
                "process": {"pid": os.getpid(), "uid": os.getuid(), "host": platform.node()},
                "data": {"directory": str(self.directory), "free": shutil.disk_usage(self.directory).free},
                "headers": request.fields,
            }
        )

    async def _notes(self, request: Request, _: str) -> Response:
        if request.method in {"GET", "HEAD"}:
            return answer({"notes": [_shown(note) for note in self.notes.all()]})
        if request.method != "POST":
            return _not_allowed("GET, POST")
        body = await request.read(limit=MAX_NOTE * 8)
        try:
            text = json.loads(body or b"")["text"]
        except (ValueError, TypeError, KeyError):
            return answer({"error": 'Send JSON such as {"text": "..."}'}, 400 if body is not None else 413)
        return answer(_shown(self.notes.add(str(text))), 201)

    async def _note(self, request: Request, note_id: str) -> Response:
        if request.method != "DELETE":
            return _not_allowed("DELETE")
        self.notes.remove(note_id)
        return Response(204)

    async def _export(self, request: Request, _: str) -> Response:
        text = "\n\n---\n\n".join(
            f"{note.text}\n\n*{time.strftime('%Y-%m-%d %H:%M', time.localtime(note.created))}*"
            for note in self.notes.all()
        )
        headers = {
            "Content-Type": "text/markdown; charset=utf-8",
            "Content-Disposition": 'attachment; filename="notes.md"',
            "Cache-Control": "no-store",
        }
        return Response(200, headers, f"# Notes\n\n{text}\n".encode())

    async def _list(self, request: Request, _: str) -> Response:
        return answer({"files": self.files.all()}) if request.method in {"GET", "HEAD"} else _not_allowed("GET")

    async def _file(self, request: Request, name: str) -> Response:
        if request.method in {"GET", "HEAD"}:
            return _download(self.files.open(name), name, request.headers.get("range", ""))
        if request.method == "PUT":
            await self._upload(request, name)
            return answer({"name": name}, 201)
        if request.method == "DELETE":
            self.files.remove(name)
            return Response(204)
        return _not_allowed("GET, PUT, DELETE")

    async def _upload(self, request: Request, name: str) -> None:
        with self.files.writing(name) as file:
            async for chunk in request.body():
                file.write(chunk)

    async def _clock(self, request: Request, _: str) -> Response:
        if not request.upgrade or request.headers.get("upgrade", "").lower() != "websocket":
            return Response(426, {"Upgrade": "websocket"}, b"This is a WebSocket\n")
        if request.headers.get("sec-websocket-version") != "13" or "sec-websocket-key" not in request.headers:
            return Response(426, {"Sec-WebSocket-Version": "13"}, b"Speak WebSocket version 13\n")
        return Response(websocket=self._tick)

    async def _tick(self, socket: Socket) -> None:
        reading = asyncio.get_running_loop().create_task(_until_closed(socket))
        try:
            while not reading.done():
                now = time.time()
                up = round(time.monotonic() - self._begun, 1)
                await socket.send(json.dumps({"now": now, "up": up}))
                await asyncio.wait({reading}, timeout=1 - now % 1)
        finally:
            reading.cancel()


async def _until_closed(socket: Socket) -> None:
    while await socket.receive() is not None:
        pass


def _shown(note: object) -> dict[str, object]:
    return {name: getattr(note, name) for name in ("id", "text", "created")}


def _not_allowed(allow: str) -> Response:
    response = answer({"error": f"Only {allow} here"}, 405)
    response.headers["Allow"] = allow
    return response


def byte_range(asked: str, size: int) -> tuple[int, int] | None:
    """Return first byte and length of a single range (RFC 9110 section 14), None for the whole file.

    :raises StorageError: no byte of the file is in the range.
    """
    unit, _, spec = asked.partition("=")
    first, dash, last = spec.strip().partition("-")
    digits = all(part.isascii() and (part.isdigit() or not part) for part in (first, last))
    if unit.strip().lower() != "bytes" or not dash or not digits or not (first or last):
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size - 1, int(last)) if first and last else size - 1
    if first and last and int(last) < int(first):
        return None
    if start > end:
        raise StorageError(416, "No byte of the file is in this range")
    return start, end - start + 1


def _download(file: BinaryIO, name: str, asked: str) -> Response:
    size = os.fstat(file.fileno()).st_size
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
        "Content-Security-Policy": "sandbox; default-src 'none'",
        "Cache-Control": "no-store",
        "Accept-Ranges": "bytes",
    }
    try:
        part = byte_range(asked, size)
    except StorageError:
        file.close()
        raise
    if part is None:
        return Response(200, headers, file=file, length=size)
    start, length = part
    file.seek(start)
    headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
    return Response(206, headers, file=file, length=length)
