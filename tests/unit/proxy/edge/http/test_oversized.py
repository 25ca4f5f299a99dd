"""Heads above the limit: which of them show a page, and which cookies it expires."""

from __future__ import annotations

import time

import pytest

from dispatcher.proxy.edge.http.oversized import MAX_NAMES, Oversized

START = b"GET /lab/tree HTTP/1.1\r\nHost: app.test:8080\r\nAccept: text/html,*/*\r\n"


def jar(count: int, size: int = 1000) -> bytes:
    return b"; ".join(b"c%d=%b" % (number, b"x" * size) for number in range(count))


def expired(lines: bytes) -> set[bytes]:
    return {line.partition(b"=")[0].removeprefix(b"Set-Cookie: ") for line in lines.splitlines()}


def test_the_cookies_that_were_read_expire_wherever_they_may_have_been_set():
    head = Oversized(
        START + b"Cookie: dispatcher=token; " + jar(3) + b"; __Host-dispatcher-form=a; __Secure-x=y; cut"
    )
    assert head.page and head.names == [b"c0", b"c1", b"c2", b"__Secure-x"]
    lines = head.lines(b"").splitlines()
    assert b"Set-Cookie: c0=; Max-Age=0; Path=/" in lines
    assert b"Set-Cookie: c0=; Max-Age=0; Path=/; Domain=app.test" in lines
    assert b"Set-Cookie: c0=; Max-Age=0; Path=/lab" in lines
    assert b"Set-Cookie: __Secure-x=; Max-Age=0; Path=/; Secure" in lines
    assert len(lines) == 4 * 3
    assert b"Set-Cookie: c0=; Max-Age=0; Path=/; Domain=example.org" in head.lines(b"example.org").splitlines()


def test_a_browser_that_sends_cookies_first_gets_a_page():
    assert Oversized(b"GET / HTTP/1.1\r\nHost: a\r\nCookie: " + jar(9)).names
    assert not Oversized(START + b"Sec-Fetch-Mode: cors\r\nCookie: " + jar(9)).page


@pytest.mark.parametrize(
    ("head", "page"),
    [
        (START.replace(b"/lab", b"/" + b"a" * 9000) + b"Cookie: dispatcher=token; " + jar(8), True),  # a long link
        (START + b"Cookie: dispatcher=token; DISPATCHER=b; Dispatcher-Form=" + b"x" * 9000, True),
        (START.replace(b"text/html", b"image/png") + b"Cookie: " + jar(9), False),
        (START + b"Cookie: " + b"x" * 9000, True),
        (START + b"Cookie: a b=c; \x00=d; \xe9=e; a,b=f; =g; " + b"x" * 9000, True),
        (b"\x00" * 9000, False),
    ],
)
def test_no_cookie_expires(head, page):
    found = Oversized(head)
    assert found.page == page and not found.names and not found.lines(b"")


def test_hosts_and_paths_write_nothing_else_into_the_answer():
    for host, path in (
        (b"a;b", b"/a;b/c"),
        (b"127.0.0.1", b"/a\x00b/"),
        (b"[::1]:1", b"*"),
        (b"localhost", b"//x//y"),
    ):
        head = b"GET " + path + b" HTTP/1.1\r\nAccept: text/html\r\nHost: " + host + b"\r\nCookie: " + jar(2)
        lines = Oversized(head).lines(b"")
        assert expired(lines) == {b"c0", b"c1"}
        assert b"Domain" not in lines and b"\x00" not in lines and lines.count(b";") == 2 * lines.count(b"\r\n")


def test_the_answer_and_the_work_are_bounded():
    assert len(Oversized(START + b"Cookie: " + jar(500, 10)).names) == MAX_NAMES
    names = b"; ".join(b"%0250d=" % number for number in range(200))
    deep = START.replace(b"/lab/tree", b"/" + b"/".join([b"d" * 60] * 20))
    assert len(Oversized(deep + b"Cookie: " + names).lines(b"")) < 40_000

    def seconds(size: int) -> float:
        took = []
        for noise in (b";", b"a", b"; ", b" ", b"a=;", b";" + b"a" * 256, b"\r\nCookie: "):
            head = START + b"Cookie: " + noise * (size // len(noise))
            start = time.process_time()
            Oversized(head).lines(b"")
            took.append(time.process_time() - start)
        return max(took)

    few = min(seconds(65536) for _ in range(3))
    assert min(seconds(4 * 65536) for _ in range(3)) < 12 * few + 0.01
