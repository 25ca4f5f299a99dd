"""The demo as a Flask application: notes, files, a live clock, and facts about its user."""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, abort, request, send_file
from werkzeug.exceptions import BadRequest, HTTPException

from dispatcher.demo.storage import MAX_NOTE, Files, Notes, StorageError

if TYPE_CHECKING:
    from wsproto import WSConnection
    from wsproto.events import CloseConnection

MAX_CLOCKS = 32  # open WebSockets; each has a thread
MAX_MESSAGE = 64 * 1024  # bytes of a WebSocket message
SEND_TIMEOUT = 60  # seconds for a client that does not read
CLOSE_TIMEOUT = 0.5  # seconds for the closing handshake of a WebSocket
CHUNK = 1024 * 1024
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Clocks:
    """The open WebSockets: each gets the time once a second.

    One thread reads and writes a WebSocket, so that nothing follows its Close frame (RFC 6455, section 5.5.1).
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._free = threading.BoundedSemaphore(MAX_CLOCKS)
        self._stopping, self._stop = os.pipe()  # readable once its other end is closed

    def serve(self, connection: socket.socket, fields: Iterable[tuple[str, str]]) -> None:
        """Serve a WebSocket until it is closed.

        :param fields: the header of the request.
        :raises Full: too many are open; :raises RemoteProtocolError: not a handshake of this version.
        """
        from wsproto import ConnectionType, WSConnection  # not needed for the app to be ready
        from wsproto.events import AcceptConnection

        session = WSConnection(ConnectionType.SERVER)
        session.initiate_upgrade_connection([(name.encode(), value.encode()) for name, value in fields], "/clock")
        if not self._free.acquire(blocking=False):
            raise Full
        try:
            connection.settimeout(SEND_TIMEOUT)
            connection.sendall(session.send(AcceptConnection()))
            connection.sendall(session.send(self._tick(connection, session)))
            connection.shutdown(socket.SHUT_WR)
            end = time.monotonic() + CLOSE_TIMEOUT  # a client that still sends reads the Close frame first
            while (left := end - time.monotonic()) > 0 and select.select([connection], [], [], left)[0]:
                if not connection.recv(65536):
                    break
        except OSError:
            pass  # the client is gone
        finally:
            self._free.release()

    def _tick(self, connection: socket.socket, session: WSConnection) -> CloseConnection:
        """Send the time and answer frames; return the Close frame to send at the end.

        :raises OSError: the client is gone.
        """
        from wsproto.events import CloseConnection, Message, Ping, TextMessage

        sources: list[Any] = [connection, self._stopping]
        size, tick = 0, time.time()
        while True:
            now = time.time()
            if not 0 < tick - now <= 1:
                text = json.dumps({"now": now, "up": round(time.monotonic() - self._began, 3)})
                connection.sendall(session.send(TextMessage(text)))
                tick = now + 1 - now % 1
            ready = select.select(sources, [], [], max(0.0, tick - time.time()))[0]
            if self._stopping in ready:
                return CloseConnection(1001, "the app is stopping")
            if not ready:
                continue
            data = connection.recv(65536)
            if not data:
                raise ConnectionResetError
            session.receive_data(data)
            for event in session.events():
                if isinstance(event, CloseConnection):
                    return event.response()
                if isinstance(event, Ping):
                    connection.sendall(session.send(event.response()))
                elif isinstance(event, Message):
                    size += len(event.data)
                    if size > MAX_MESSAGE:
                        return CloseConnection(1009, "Message is too big")
                    size = 0 if event.message_finished else size

    def close(self) -> None:
        """Close all WebSockets."""
        os.close(self._stop)


class Full(Exception):
    """No further WebSocket is accepted."""


class Ended(Response):
    """The response of a request that became a WebSocket: nothing more is written."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        raise ConnectionAbortedError("the WebSocket has ended")


def create_app(directory: Path, portal: str = "/auth") -> Flask:
    """Return the application; `app.extensions["clocks"]` holds its WebSockets.

    :param directory: where it keeps everything.
    :param portal: path of the portal, for the link to sign out.
    :raises OSError: the directory cannot be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    notes, files, started = Notes(directory), Files(directory), time.time()
    app = Flask(__name__, static_url_path="")
    app.json.ensure_ascii = False  # type: ignore[attr-defined]
    app.json.sort_keys = False  # type: ignore[attr-defined]
    clocks = app.extensions["clocks"] = Clocks()

    @app.before_request
    def _refuse_other_origins() -> None:
        site = request.headers.get("Sec-Fetch-Site", "none")
        if request.method not in {"GET", "HEAD", "OPTIONS"} and site not in {"same-origin", "none"}:
            abort(403, "A page of another origin cannot change anything here")

    @app.after_request
    def _add_headers(response: Response) -> Response:
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.errorhandler(StorageError)
    def _storage_error(error: StorageError) -> tuple[dict[str, str], int]:
        return {"error": str(error)}, error.status

    @app.errorhandler(HTTPException)
    def _http_error(error: HTTPException) -> tuple[dict[str, str | None], int, list[tuple[str, str]]]:
        headers = [one for one in error.get_headers() if one[0] != "Content-Type"]
        return {"error": error.description}, error.code or 500, headers

    @app.get("/")
    def _index() -> Response:
        return app.send_static_file("index.html")

    @app.get("/health")
    def _health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/about")
    def _about() -> dict[str, object]:
        return {
            "user": request.headers.get("X-Dispatcher-User") or os.environ.get("DISPATCHER_USER", ""),
            "since": started,
            "portal": portal,
            "process": {"pid": os.getpid(), "uid": os.getuid(), "host": platform.node()},
            "data": {"directory": str(directory), "free": shutil.disk_usage(directory).free},
            "headers": [[name.lower(), value] for name, value in request.headers],
        }

    @app.get("/clock")
    def _upgrade_needed() -> Response:
        headers = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        return Response("This is a WebSocket\n", 426, headers, mimetype="text/plain")

    @app.route("/clock", websocket=True)
    def _clock() -> Response:
        from wsproto.utilities import RemoteProtocolError

        try:
            clocks.serve(request.environ["werkzeug.socket"], request.headers)
        except Full:
            abort(503, "Too many open tabs")
        except RemoteProtocolError:
            return _upgrade_needed()
        return Ended()

    @app.get("/notes")
    def _list_notes() -> dict[str, object]:
        return {"notes": [asdict(note) for note in notes.all()]}

    @app.post("/notes")
    def _add_note() -> tuple[dict[str, object], int]:
        request.max_content_length = MAX_NOTE * 8
        try:
            text = str(request.get_json(force=True)["text"])
            text.encode()
        except (BadRequest, TypeError, KeyError, RecursionError, UnicodeError):
            abort(400, 'Send JSON such as {"text": "..."}')
        return asdict(notes.add(text)), 201

    @app.delete("/notes/<note_id>")
    def _remove_note(note_id: str) -> tuple[str, int]:
        notes.remove(note_id)
        return "", 204

    @app.get("/notes.md")
    def _export_notes() -> Response:
        text = "\n\n---\n\n".join(
            f"{note.text}\n\n*{time.strftime('%Y-%m-%d %H:%M', time.localtime(note.created))}*"
            for note in notes.all()
        )
        headers = {"Content-Disposition": 'attachment; filename="notes.md"'}
        return Response(f"# Notes\n\n{text}\n", headers=headers, mimetype="text/markdown")

    @app.get("/files")
    def _list_files() -> dict[str, object]:
        return {"files": files.all()}

    @app.get("/files/<path:name>")
    def _download(name: str) -> Response:
        path = files.path(name)
        response = send_file(path, "application/octet-stream", as_attachment=True, download_name=path.name)
        response.headers["Cache-Control"] = "no-store"
        response.headers["Content-Security-Policy"] = "sandbox; default-src 'none'"
        return response

    @app.put("/files/<path:name>")
    def _upload(name: str) -> tuple[dict[str, str], int]:
        with files.writing(name) as file:
            shutil.copyfileobj(request.stream, file, CHUNK)
        return {"name": name}, 201

    @app.delete("/files/<path:name>")
    def _remove_file(name: str) -> tuple[str, int]:
        files.remove(name)
        return "", 204

    return app
