"""What a stranger sends to the portal costs time by its bytes, not by their square: the portal is one process.

Each request goes the whole way, in one thread: the edge's parser and rules, the head as waitress gets it, its
parser, the application.
"""

from __future__ import annotations

import io
import sys
import time

import pytest
from waitress.adjustments import Adjustments
from waitress.parser import HTTPRequestParser
from waitress.task import rename_headers

from dispatcher.proxy.edge.http import field_names
from dispatcher.proxy.edge.http.field_names import BadHead
from dispatcher.proxy.edge.http.request import MAX_PORTAL_FIELDS, parse_request, portal_lines, upstream_head
from tests.support.portal_manager import HTML, make

HEAD_BYTES = 65536
ADJUSTMENTS = Adjustments(max_request_header_size=2 * HEAD_BYTES)
UNITS = (
    " ",
    "\t",
    ";",
    ",",
    "=",
    '"',
    "\\",
    "a",
    "/",
    "%",
    "-",
    " \t",
    " ;",
    "; ",
    ", ",
    "a=",
    "a;",
    '"a",',
    '\\"',
    ';a="\\',
)
#: Field -> beginnings of its value.
FIELDS = {
    "Accept": ("", "text/html", "text/html;q=", "text/html;a="),
    "Accept-Language": ("", "de;q="),
    "Authorization": ("Basic ", "Digest a="),
    "Cache-Control": ("", "max-age="),
    "Content-Type": ("", "multipart/form-data; boundary=", "application/json; charset=", "application/json;a*0*="),
    "Cookie": ("", "dispatcher=", "dispatcher-form=", "a=", 'a="'),
    "If-Match": ("", "W/"),
    "If-Modified-Since": ("", "Mon, 30 Nov "),
    "Origin": ("", "https://"),
    "Range": ("", "bytes=0-"),
    "Referer": ("https://",),
    "Sec-Fetch-Dest": ("",),
    "User-Agent": ("", "Mozilla/5.0 ("),
    "X-Other": ("", "a"),
}
BODIES = {
    "application/json": ("[", '{"a":', "1", '"', "\\", " ", '"\\u0041', "[],", "-"),
    "application/x-www-form-urlencoded": ("a=b&", "&", "%", "%41", "+", ";", "token=%"),
    "multipart/form-data; boundary=q": (
        "\r",
        "\n",
        "\r\n",
        "-",
        "--q",
        "--q\r\n",
        "\r\n--q\r\n\r\n",
        "a: b\r\n",
        " ",
    ),
}
QUERIES = ("next=/%25", "&", "a=&", "=", "%", "next=/x&", "/", "%09", "+", ";")


@pytest.fixture(scope="module")
def portal():
    return make()[0]


def answer(app, lines: str, *, method: str = "GET", target: str = "/auth/login", body: bytes = b"") -> int:
    """Return the status, the edge's or the portal's."""
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    head = f"{method} {target} HTTP/1.1\r\nHost: portal.test\r\n{lines}\r\n{length}\r\n".encode("latin-1")
    try:
        request = parse_request(head, 100)
        request.lines = portal_lines(request.lines)
    except BadHead as error:
        return error.status
    cookie = request.fields.get(field_names.COOKIE, b"")
    parser = HTTPRequestParser(ADJUSTMENTS)
    parser.received(upstream_head(request, request.host, cookie, b"192.0.2.1", b"http", b"", b"id"))
    assert parser.error is None
    environ = {
        "REQUEST_METHOD": parser.command, "PATH_INFO": parser.path, "QUERY_STRING": parser.query, "SCRIPT_NAME": "",
        "SERVER_NAME": "portal", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": "",
        "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body), "wsgi.errors": sys.stderr, "wsgi.version": (1, 0),
        "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False,
    }  # fmt: skip
    for name, value in parser.headers.items():
        environ[rename_headers.get(name, f"HTTP_{name}")] = value
    statuses = []
    b"".join(app.wsgi_app(environ, lambda status, *_: statuses.append(int(status[:3]))))
    return statuses[0]


def costs(run, size: int) -> None:
    """Fail if `run`, called with a number of bytes, takes time by the square of it."""

    def seconds(size: int) -> float:
        start = time.process_time()
        run(size)
        return time.process_time() - start

    if (most := seconds(size)) < 0.03:
        return
    most, few = (min(seconds(each) for _ in range(3)) for each in (size, size // 4))
    assert most < 0.2, most
    assert most < 8 * few, (few, most)


@pytest.mark.parametrize("field", FIELDS)
def test_fields(portal, field: str) -> None:
    def run(start: str, unit: str, end: str, size: int) -> None:
        value = start + unit * (size // len(unit)) + end
        lines = f"{field}: {value}" + ("" if field == "Accept" else f"\r\nAccept: {HTML}")
        post = field in {"Content-Type", "Origin", "Cookie"}
        status = answer(portal, lines, method="POST" if post else "GET", body=b"user=a" if post else b"")
        assert status in {200, 303, 400, 403, 431}

    for start in FIELDS[field]:
        for unit in UNITS:
            for end in ("", "x"):
                for size in (
                    (HEAD_BYTES - 4096,) if field == "Cookie" else (MAX_PORTAL_FIELDS - 200, HEAD_BYTES - 4096)
                ):
                    costs(lambda size, start=start, unit=unit, end=end: run(start, unit, end, size), size)


@pytest.mark.parametrize("kind", BODIES)
def test_bodies(portal, kind: str) -> None:
    for unit in BODIES[kind]:
        for start in (
            "",
            '--q\r\nContent-Disposition: form-data; name="a"\r\n\r\n' if "multipart" in kind else "user=",
        ):

            def run(size: int, unit: str = unit, start: str = start) -> None:
                body = (start + unit * (size // len(unit))).encode()
                assert answer(portal, f"Content-Type: {kind}", method="POST", body=body) in {400, 403, 413, 415}

            costs(run, 64000)


@pytest.mark.parametrize("before", ["/auth/login?", "/auth/welcome?proof=", "/auth/", "/auth/static/"])
def test_paths_and_queries(portal, before: str) -> None:
    for unit in QUERIES:
        costs(
            lambda size, unit=unit: answer(portal, f"Accept: {HTML}", target=before + unit * (size // len(unit))),
            61000,
        )
