"""The demo as a Flask application: notes, files, a live clock, and facts about its user."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, abort, request, send_file
from werkzeug.exceptions import BadRequest, HTTPException

from dispatcher.demo.storage import MAX_NOTE, Files, Notes, StorageError

if TYPE_CHECKING:
    from simple_websocket import Server

MAX_CLOCKS = 32  # open WebSockets; each has two threads
MAX_MESSAGE = 64 * 1024  # bytes of a WebSocket message
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
    """The open WebSockets: each gets the time once a second."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._open: set[Server] = set()
        self._lock = threading.Lock()

    def serve(self, environ: dict[str, Any]) -> None:
        """Serve a WebSocket until it is closed.

        :raises RemoteProtocolError: the request is not a handshake that this server understands.
        """
        from simple_websocket import ConnectionClosed, Server  # not needed for the app to be ready
        from wsproto.utilities import LocalProtocolError

        connection: socket.socket = environ["werkzeug.socket"]
        connection.settimeout(None)
        opened = Server.accept(environ, max_message_size=MAX_MESSAGE)
        with self._lock:
            self._open.add(opened)
        try:
            while True:
                now = time.time()
                opened.send(json.dumps({"now": now, "up": round(time.monotonic() - self._began, 3)}))
                end = time.monotonic() + 1 - now % 1
                while (left := end - time.monotonic()) > 0:
                    opened.receive(timeout=left)
        except (ConnectionClosed, OSError):
            pass
        except LocalProtocolError:
            pass  # the server's thread has just sent a close frame
        finally:
            with self._lock:
                self._open.discard(opened)
            opened.thread.join(CLOSE_TIMEOUT)  # it answers a close frame
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def full(self) -> bool:
        """Whether no further WebSocket is accepted."""
        return len(self._open) >= MAX_CLOCKS

    def close(self) -> None:
        """Close all WebSockets."""
        from wsproto.utilities import LocalProtocolError

        with self._lock:
            for opened in self._open:
                if opened.connected:
                    with contextlib.suppress(OSError, LocalProtocolError):
                        opened.close(1001, "the app is stopping")
                opened.event.set()


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

        if clocks.full:
            abort(503, "Too many open tabs")
        try:
            clocks.serve(request.environ)
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
