"""A manager that answers by the book (docs/reference/rest.md) and knows nothing: for tests of its clients."""

from __future__ import annotations

import json
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit


class FakeManager:
    """Serves a Unix socket.

    :ivar agents: name -> AGENT; :ivar users: who exists, with the password; :ivar requests: what was asked.
    :ivar apps: what may be named; None for the default app.
    :ivar copies: name -> COPY..., of agents that may have been removed.
    :ivar script: what `GET /agents/NAME/state` says next, one after the other.
    """

    def __init__(self, path):
        self.path = str(path)
        self.agents, self.users, self.requests, self.script = {}, {}, [], []
        self.answers, self.copies = {}, {}
        self.apps = {None, "demo", "notebook", "x"}
        self.slow = 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def address_string(self):
                return "unix"

            def log_message(self, *args):
                pass

            def any(self):
                size = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(size)) if size else None
                parts = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(parts.query).items()}
                path = [unquote(part) for part in parts.path.strip("/").split("/")]
                outer.requests.append((self.command, "/" + "/".join(path), query, body))
                if body is not None and set(body) - {
                    *("name", "password", "app", "state", "user", "service", "scopes", "expires", "note"),
                    *("force", "dry_run", "authenticator"),
                }:
                    status, answer = problem(400, "bad-request", "Unknown member")
                else:
                    status, answer = outer.answer(self.command, path, query, body)
                content = b"" if answer is None else json.dumps(answer).encode()
                self.send_response(status)
                kind = "application/problem+json" if status >= 400 else "application/json"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = any

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request, client_address):
                """Say nothing of a client that has gone: a test would take it for the command's output."""
                if not isinstance(sys.exc_info()[1], ConnectionError):
                    super().handle_error(request, client_address)

        self._server = Server(self.path, Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self):
        return f"unix://{self.path}"

    def add(self, name, state="stopped", **more):
        self.users.setdefault(name.partition(":")[0], "secret-password")
        self.agents[name] = {
            "name": name,
            "user": name.partition(":")[0],
            "app": "demo",
            "provider": "subprocess",
            "state": state,
            "desired": state,
            "stage": "",
            "detail": "",
            "fraction": None,
            "since": "2026-01-02T03:04:05+00:00",
            "failure": None,
            "outdated": False,
            "last_used": None,
            "created": "2026-01-01T00:00:00+00:00",
            "reachable": True,
            "observed_at": "2026-01-02T03:04:05+00:00",
            "disk": None,
            "move": None,
        } | more
        return self.agents[name]

    def keep(self, name, size=3 * 1024**2, why="the agent was removed and its data kept"):
        copy = {"id": None, "provider": "subprocess", "kind": "directory", "time": "2026-01-02T03:04:05+00:00"}
        self.copies.setdefault(name, []).append(copy | {"size": size, "why": why})

    def fail(self, name, log=("Traceback", "boom")):
        failure = {
            "what": f"{name} did not become ready",
            "why": "exit code 1",
            "fix": "see its log",
            "log": list(log),
        }
        self.agents[name].update(state="failed", failure=failure)

    def answer(self, method, path, query, body):
        key = f"{method} /{'/'.join(path)}"
        if key in self.answers:
            found = self.answers[key]
            return found(query, body) if callable(found) else found
        if path[0] == "agents":
            return self._agents(method, path[1:], query, body)
        return problem(404, "not-found", "There is no such path")

    def _agents(self, method, path, query, body):
        if not path and method == "GET":
            found = [a for a in self.agents.values() if query.get("state") in (None, a["state"])]
            return 200, {"agents": found}
        if not path:
            name, password = body["name"], body.get("password")
            app = body.get("app")
            new = name not in self.users
            if not new:
                name = f"{name}:{app}" if app else name
            if name in self.agents:
                return problem(409, "conflict", f"{name} exists")
            if app not in self.apps:
                return problem(400, "bad-request", f"There is no app {app}")
            if new and password is None:
                return problem(400, "bad-request", f"The user {name} is new", missing="password")
            if password is not None:
                self.users[name] = password
            return 201, self.add(name, app=app or "demo")
        agent = self.agents.get(path[0])
        if path[1:] == ["copies"] and (agent or path[0] in self.copies):
            if method == "GET":
                return 200, {"copies": self.copies.get(path[0], [])}
            return 200, {"purged": len(self.copies.pop(path[0], []))}
        if agent is None:
            return problem(404, "not-found", f"There is no agent {path[0]}")
        what = path[1] if len(path) > 1 else ""
        if method == "GET":
            return self._read(agent, what, query)
        time.sleep(self.slow)
        if method == "DELETE":
            del self.agents[path[0]]
            return (204, None) if "wait" in query else (202, agent | {"desired": "absent"})
        if what == "state":
            agent["desired"] = body["state"]
            if self.script or "wait" not in query:
                return 202, state(agent)
            agent["state"] = body["state"]
            return 200, state(agent)
        if what == "restart":
            agent["state"] = "running"
            return 200, state(agent)
        if what == "reset_data":
            return 200, state(agent)
        if what == "password":
            self.users[agent["user"]] = body["password"]
            return 204, None
        return problem(404, "not-found", "There is no such path")

    def _read(self, agent, what, query):
        if what == "state":
            if self.script:
                agent.update(self.script.pop(0))
            return 200, state(agent)
        if what == "runtime":
            return 200, {
                "endpoint": "unix:/run/d/a/x/s",
                "uid": 200001,
                "usage": {
                    "memory": 3 * 1024**2,
                    "cpu_seconds": 1.5,
                    "disk": 5 * 1024**2,
                    "disk_limit": 64 * 1024**2,
                },
            }
        if what == "why":
            return 200, {"agent": agent["name"], "sentences": ["It was asked to stop.", "It stopped."]}
        if what == "logs":
            lines = [f"line {number}" for number in range(1, 6)]
            if query.get("after"):
                return 200, {"lines": [], "cursor": "5"}
            return 200, {"lines": lines[-int(query["tail"]) :] if query["tail"] != "0" else [], "cursor": "5"}
        return (200, agent) if not what else problem(404, "not-found", "There is no such path")


def state(agent):
    keys = ("state", "desired", "stage", "detail", "fraction", "since", "failure", "outdated")
    return {key: agent[key] for key in keys}


def problem(status, code, title, **more):
    return status, {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": "",
        "fix": "",
        "code": code,
    } | more
