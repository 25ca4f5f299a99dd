"""A whole installation with the app of `cases_app`, and raw clients for it: what tests of reported cases share."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import time
from pathlib import Path

import psutil

from tests.support.installation import Answer, Installation, until

APP = Path(__file__).parent / "cases_app.py"
TABLE = """[apps.{name}]
health = "/health"
{keys}
[apps.{name}.subprocess]
command = ["{{python}}", "{{app}}", "{{{{socket}}}}"]
read_only = ["{{app}}"]
"""


def app(name: str = "web", *keys: str) -> str:
    """Return an app's tables; `keys` are further lines of `[apps.NAME]`."""
    return TABLE.format(name=name, keys="\n".join(keys).replace("{", "{{").replace("}", "}}"))


class Site(Installation):
    """Manager, proxy and the app that does as it is told."""

    def __init__(self, apps: str = "", extra: str = "", proxy: str = "") -> None:
        base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
        base.chmod(0o755)
        super().__init__(base, apps or app(), extra, proxy)
        (base / "app.py").write_text(APP.read_text())

    def __enter__(self) -> Site:
        try:
            self.start("manager")
            self.start("proxy")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, seconds: float = 20.0) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def head(self, target: str, cookie: str, *lines: str, method: str = "GET", host: str = "") -> bytes:
        fields = [f"{method} {target} HTTP/1.1", f"Host: {host or f'127.0.0.1:{self.port}'}", *lines]
        if cookie:
            fields.append(f"Cookie: {cookie}")
        return "\r\n".join([*fields, "", ""]).encode()

    def open(self, target: str, cookie: str, *lines: str, host: str = "") -> socket.socket:
        """Return a connection on which a request was sent."""
        sock = self.connect()
        sock.sendall(self.head(target, cookie, *lines, host=host))
        return sock

    def upgrade(self, target: str, cookie: str, *lines: str, host: str = "") -> tuple[socket.socket, bytes]:
        """Return a connection and the head of the answer to its upgrade."""
        sock = self.open(target, cookie, *UPGRADE, *lines, host=host)
        return sock, head_of(sock)

    def post(self, path: str, body: object, cookie: str = "", **headers: str) -> Answer:
        """Send JSON to the portal as a program does."""
        return self.web("POST", path, body, Accept="application/json", Cookie=cookie, **headers)

    def state(self, name: str) -> dict:
        return self.admin("GET", f"/agents/{name}/state").json()

    def put(self, name: str, state: str, wait: int = 0) -> Answer:
        return self.admin("PUT", f"/agents/{name}/state" + (f"?wait={wait}" if wait else ""), {"state": state})

    def reach(self, name: str, state: str, seconds: float = 30.0) -> None:
        until(f"{name} is {state}", lambda: self.state(name)["state"] == state, seconds)

    def log(self, what: str) -> str:
        return (self.base / f"{what}.log").read_text(errors="replace")

    def workers(self) -> list[psutil.Process]:
        """All processes of the proxy."""
        parent = psutil.Process(self.processes["proxy"].pid)
        return [parent, *parent.children(recursive=True)]

    def memory(self) -> int:
        """Bytes of memory that the proxy's processes use."""
        return sum(process.memory_info().rss for process in self.workers())

    def descriptors(self) -> int:
        return sum(process.num_fds() for process in self.workers())


UPGRADE = (
    "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)  # fmt: skip


def head_of(sock: socket.socket) -> bytes:
    """Return the head of an answer, byte by byte, so that nothing of what follows is taken."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        if not byte:
            break
        head += byte
    return head


def status_of(sock: socket.socket) -> int:
    return int(head_of(sock).split(b" ", 2)[1])


def frame(text: bytes, kind: int = 1) -> bytes:
    """Return a client's WebSocket frame (RFC 6455, 5.2) with a mask of zeros."""
    return bytes([0x80 | kind, 0x80 | len(text)]) + bytes(4) + text


def ended(sock: socket.socket, seconds: float) -> bytes:
    """Return the last bytes that came until the other side ended the connection, or fail."""
    end, last = time.monotonic() + seconds, b""
    while (left := end - time.monotonic()) > 0:
        sock.settimeout(left)
        with contextlib.suppress(TimeoutError):
            try:
                data = sock.recv(1 << 18)
            except ConnectionError:
                return last
            if not data:
                return last
            last = (last + data)[-200:]
    raise AssertionError(f"still open after {seconds} s; last came {last[-100:]!r}")
