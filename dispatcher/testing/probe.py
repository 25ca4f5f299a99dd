"""The probe: the small app that the conformance kit runs in every agent.

It answers over HTTP what an agent can see and do, so that a provider is judged from the inside, through its
own endpoint.  One file, standard library only, no import of the project: copy it into an image, or let the
provider run it where it lies.  `probe.sh` speaks the same protocol with busybox alone.

    probe.py --unix PATH | --tcp HOST:PORT [IGNORED...]

Answers are `text/plain`; what is refused is a 4xx whose body is the error's symbolic name.

    GET  /                   probe
    GET  /id                 uid= gid= groups= pid= start= (a random word per start) host= cwd= umask=, one a line
    GET  /env  /argv         of this process as it was started, separated by NUL
    GET  /stdin              "open" or "end" on the first line, then what was read
    GET  /read?path=  /list?path=  /stat?path=      bytes; names; uid gid mode (octal) size
    GET  /connect?to=unix:PATH|tcp:HOST:PORT        connected
    GET  /socket?family=N    opened, if a socket of that address family can be had
    GET  /count              a number kept in memory; POST adds one
    POST /write?path=        the body becomes the file
    POST /log?repeat=N       the body, and a line end, N times to standard output
    POST /memory?bytes=N     takes and touches so much memory and keeps it
    POST /fork?count=N       how many processes could be had, at most N
    POST /burn?seconds=N     uses one processor for so long
    POST /heartbeat?path=    a detached process that rewrites the file ten times a second and ignores SIGTERM
    POST /exit?code=N        ends with that code

Environment: `PROBE_EXIT=N` prints "last words" and ends with N at once; `PROBE_IGNORES_SIGTERM=1` ignores SIGTERM;
otherwise SIGTERM writes `saved` into $DISPATCHER_DATA and ends with 0.
"""

from __future__ import annotations

import errno
import os
import secrets
import signal
import socket
import stat
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

START = secrets.token_hex(8)


class Probe:
    """Answers requests; holds what must survive a suspension."""

    def __init__(self) -> None:
        self.count = 0
        self.ballast: list[bytearray] = []
        self.stdin = b""
        self.stdin_ended = False
        self.lock = threading.Lock()

    def read_stdin(self) -> None:
        """Read standard input to its end; run in a thread."""
        while block := os.read(0, 65536):
            self.stdin += block
        self.stdin_ended = True

    def get(self, path: str, query: dict[str, str]) -> bytes:
        """Answer a GET."""
        if path == "/":
            return b"probe\n"
        if path == "/id":
            groups = ",".join(map(str, os.getgroups()))
            words = {"uid": os.getuid(), "gid": os.getgid(), "groups": groups, "pid": os.getpid()}
            words |= {"start": START, "host": socket.gethostname(), "cwd": os.getcwd(), "umask": umask()}
            return "".join(f"{name}={value}\n" for name, value in words.items()).encode()
        if path in {"/env", "/argv"}:
            return Path("/proc/self/environ" if path == "/env" else "/proc/self/cmdline").read_bytes()
        if path == "/stdin":
            return (b"end\n" if self.stdin_ended else b"open\n") + self.stdin
        if path == "/read":
            return Path(query["path"]).read_bytes()
        if path == "/list":
            return "".join(f"{name}\n" for name in sorted(os.listdir(query["path"]))).encode()
        if path == "/stat":
            status = os.lstat(query["path"])
            return f"{status.st_uid} {status.st_gid} {stat.S_IMODE(status.st_mode):o} {status.st_size}\n".encode()
        if path == "/connect":
            connect(query["to"])
            return b"connected\n"
        if path == "/socket":
            socket.socket(int(query["family"])).close()
            return b"opened\n"
        if path == "/count":
            return f"{self.count}\n".encode()
        raise FileNotFoundError(errno.ENOENT, "no such request")

    def post(self, path: str, query: dict[str, str], body: bytes) -> bytes:
        """Answer a POST."""
        if path == "/count":
            with self.lock:
                self.count += 1
                return f"{self.count}\n".encode()
        if path == "/write":
            Path(query["path"]).write_bytes(body)
        elif path == "/log":
            for _ in range(int(query.get("repeat", "1"))):
                sys.stdout.buffer.write(body + b"\n")
            sys.stdout.buffer.flush()
        elif path == "/memory":
            block = bytearray(int(query["bytes"]))
            block[::4096] = b"\x01" * len(range(0, len(block), 4096))
            self.ballast.append(block)
        elif path == "/fork":
            return f"{fork(int(query['count']))}\n".encode()
        elif path == "/burn":
            end = time.monotonic() + float(query["seconds"])
            while time.monotonic() < end:
                pass
        elif path == "/heartbeat":
            heartbeat(query["path"])
        elif path == "/exit":
            threading.Timer(0.1, os._exit, (int(query["code"]),)).start()
        else:
            raise FileNotFoundError(errno.ENOENT, "no such request")
        return b"done\n"


def umask() -> str:
    """Return this process's umask, octal."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Umask:"))


def connect(to: str) -> None:
    """Connect to an endpoint and hang up."""
    kind, _, rest = to.partition(":")
    if kind == "unix":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(2)
            sock.connect(rest)
        return
    host, _, port = rest.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), 2).close()


def fork(count: int) -> int:
    """Start up to `count` idle children, then end them; return how many there were."""
    children: list[int] = []
    try:
        while len(children) < count:
            child = os.fork()
            if not child:
                os.closerange(3, 1024)
                time.sleep(60)
                os._exit(0)
            children.append(child)
    except OSError:
        pass
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return len(children)


def heartbeat(path: str) -> None:
    """Start a detached process that rewrites `path` until it is killed."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()
    os.closerange(3, 1024)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    while True:
        Path(path).write_text(f"{time.time()}\n", encoding="ascii")
        time.sleep(0.1)


class Handler(BaseHTTPRequestHandler):
    """HTTP around a `Probe`."""

    probe: Probe
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer a GET."""
        self._answer(b"")

    def do_POST(self) -> None:
        """Answer a POST."""
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", "0"))))

    def _answer(self, body: bytes) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        status = 200
        try:
            if self.command == "POST":
                answer = self.probe.post(url.path, query, body)
            else:
                answer = self.probe.get(url.path, query)
        except OSError as error:
            status = 404 if error.errno == errno.ENOENT else 403
            answer = (errno.errorcode.get(error.errno or 0) or type(error).__name__).encode()
        except MemoryError:
            status, answer = 403, b"ENOMEM"
        except (KeyError, ValueError) as error:
            status, answer = 400, repr(error).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def address_string(self) -> str:
        """A Unix peer has no address."""
        return "-"

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the output belongs to /log."""


class Server(ThreadingHTTPServer):
    """Listens on a Unix socket or a TCP port."""

    daemon_threads = True
    request_queue_size = 128

    def server_bind(self) -> None:
        """Bind without asking for a host name."""
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "probe", 0


def serve(arguments: list[str]) -> None:
    """Run the probe until SIGTERM."""
    if "PROBE_EXIT" in os.environ:
        os.write(1, b"last words\n")
        sys.exit(int(os.environ["PROBE_EXIT"]))
    signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ.get("PROBE_IGNORES_SIGTERM") else _save_and_end)
    probe = Probe()
    kind, where, *_ = arguments
    if kind == "--unix":
        Path(where).unlink(missing_ok=True)
        Server.address_family = socket.AF_UNIX
        address: tuple[str, int] | str = where
    else:
        host, _, port = where.rpartition(":")
        address = (host, int(port))
    server = Server(address, type("BoundHandler", (Handler,), {"probe": probe}))  # type: ignore[arg-type]
    threading.Thread(target=probe.read_stdin, daemon=True).start()
    os.write(1, b"probe is ready\n")
    server.serve_forever(0.5)


def _save_and_end(number: int, _frame: object) -> None:
    if data := os.environ.get("DISPATCHER_DATA"):
        Path(data, "saved").write_text(f"signal {number}\n", encoding="ascii")
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1:])
