"""The front proxies of docs/howto/front-proxy.md, with the files of examples/: HTTP/2 to a real browser, streams in many tabs."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess

import pytest
from playwright.sync_api import TimeoutError, expect

from tests.browser.test_host_names import sign_in
from tests.conftest import ROOT
from tests.support.certificates import Authority
from tests.support.installation import PASSWORD, until

pytestmark = pytest.mark.browser
TABS = 8  # browsers open six connections to one host over HTTP/1.1

STREAMS = """
import base64, hashlib, os, socketserver, sys, time
from http.server import BaseHTTPRequestHandler

PAGE = b'''<!doctype html><title>Streams</title><h1>Streams</h1><p id="ticks">none</p><p id="echo"></p><p id="socket"></p><script>
new EventSource("/stream").onmessage = (event) => { document.getElementById("ticks").textContent = event.data; };
fetch("/echo", {method: "POST", body: "x".repeat(300000)}).then((answer) => answer.text())
  .then((text) => { document.getElementById("echo").textContent = "sent " + text; });
const socket = new WebSocket(location.origin.replace("http", "ws") + "/socket");
socket.onopen = () => socket.send("hello");
socket.onmessage = (event) => { document.getElementById("socket").textContent = "got " + event.data; };
</script>'''

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def address_string(self): return "-"
    def log_message(self, *_): pass
    def answer(self, body, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(str(len(body)).encode(), "text/plain")
    def echo(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        while head := self.rfile.read(2):  # short masked frames
            mask, body = self.rfile.read(4), self.rfile.read(head[1] & 127)
            text = bytes(byte ^ mask[place % 4] for place, byte in enumerate(body))
            self.wfile.write(bytes([head[0], len(text)]) + text)
        self.close_connection = True
    def do_GET(self):
        if self.path == "/socket":
            return self.echo()
        if self.path == "/client":
            fields = ("X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host")
            return self.answer(" ".join(map(self.headers.get, fields)).encode(), "text/plain")
        if self.path != "/stream":
            return self.answer(PAGE, "text/html")
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        number = 0
        while True:
            number += 1
            self.wfile.write(b"data: tick %d\\n\\n" % number)
            time.sleep(0.2)

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64
    def handle_error(self, *_): pass

os.umask(0o007)
Server(sys.argv[1], Handler).serve_forever()
"""
APP = (
    '[apps.streams.subprocess]\ncommand = ["{python}", "-c", """'
    + STREAMS.replace("\\", "\\\\").replace("{", "{{").replace("}", "}}")
    + '""", "{{socket}}"]\n'
)

NGINX = """
daemon off; pid {base}/pid; error_log {base}/log;
events {{}}
http {{
  access_log {base}/access;
  client_body_temp_path {base}/body; proxy_temp_path {base}/proxy; fastcgi_temp_path {base}/f; uwsgi_temp_path {base}/u;
  scgi_temp_path {base}/s;
  {config}
}}
"""


def front(name, base, config, port):
    """Start a front proxy with a file of examples/."""
    if name == "nginx":
        (base / "conf").write_text(NGINX.format(base=base, config=config))
        command = ["nginx", "-c", base / "conf", "-p", base, "-e", base / "log"]
    elif name == "haproxy":
        (base / "conf").write_text(f"global\n    stats socket {base}/stats\n{config}")
        command = ["haproxy", "-db", "-f", base / "conf"]
    else:
        (base / "conf").write_text(f"{{\n\tadmin off\n\tauto_https disable_redirects\n}}\n{config}")
        command = ["caddy", "run", "--adapter", "caddyfile", "--config", base / "conf"]
    with (base / "log").open("wb") as log:
        return subprocess.Popen(command, env={**os.environ, "HOME": str(base)}, stderr=log)


@pytest.fixture
def streams(site_with, free_port):
    """An installation with an app of event streams, and its address."""
    url = f"https://apps.test:{free_port}"
    return site_with(APP, people=("alice",), proxy=f'public_url = "{url}"\ntrusted_proxies = ["127.0.0.1"]'), url


FRONTS = [("nginx", "nginx.conf"), ("caddy", "Caddyfile"), ("haproxy", "haproxy.cfg")]


@pytest.mark.parametrize(("name", "file"), FRONTS)
def test_many_tabs_with_streams_work_over_http_2(streams, name, file, free_port, person, tmp_path):
    if not shutil.which(name):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{name} is not installed")
    site, url = streams
    authority = Authority(tmp_path)
    cert, key = authority.issue("apps.test", ["apps.test"])
    both = tmp_path / "both.pem"
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    config = (ROOT / "examples" / file).read_text()
    for old, new in (
        ("/etc/ssl/apps.example.org.pem", str(cert)),
        ("/etc/ssl/apps.example.org.key", str(key)),
        ("/etc/ssl/apps.example.org.both.pem", str(both)),
        ("127.0.0.1:8080", f"127.0.0.1:{site.port}"),
        ("listen 443", f"listen {free_port}"),
        ("bind :443", f"bind :{free_port}"),
        ("apps.example.org {", f"apps.test:{free_port} {{"),
        ("apps.example.org", "apps.test"),
    ):
        config = config.replace(old, new)
    process = front(name, tmp_path, config, free_port)
    try:
        page = person(ignore_https_errors=True)
        protocols = []
        until(f"{name} serves", lambda: answers(page, url), 20)
        sign_in(page)
        expect(page.get_by_role("heading", name="Streams")).to_be_visible()
        for _ in range(TABS - 1):
            page.context.new_page().goto(url)
        for tab in page.context.pages:
            expect(tab.locator("#ticks")).to_contain_text("tick")
            expect(tab.locator("#echo")).to_have_text("sent 300000")
            expect(tab.locator("#socket")).to_have_text("got hello")
            protocols.append(tab.evaluate("performance.getEntriesByType('navigation')[0].nextHopProtocol"))
        assert set(protocols) <= {"h2", "h3"}
        seen = [tab.locator("#ticks").inner_text() for tab in page.context.pages]
        until("every stream goes on", lambda: all(
            tab.locator("#ticks").inner_text() != old for tab, old in zip(page.context.pages, seen, strict=True)
        ))  # fmt: skip
        assert (
            ask_from_elsewhere(url, authority.path, tmp_path / "cookies")
            == f"127.0.0.2 https {url[8:]} over HTTP/2"
        )
        if name == "haproxy":
            until("its health check succeeds", lambda: "L7OK" in stats_of(tmp_path / "stats"))
    finally:
        process.kill()  # when asked politely, Caddy waits for its connections to end
        process.wait(10)


def stats_of(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b"show stat\n")
        return sock.makefile().read()


def test_haproxy_passes_tls_on_with_the_proxy_protocol(site_with, free_port, tmp_path):
    if not shutil.which("haproxy"):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("haproxy is not installed")
    authority = Authority(tmp_path)
    cert, key = authority.issue("apps.test", ["apps.test"])
    settings = f'proxy_protocol = true\ntls_cert = "{cert}"\ntls_key = "{key}"'
    site = site_with(APP, people=("alice",), tls=True, proxy=settings)
    page = (ROOT / "docs/howto/front-proxy.md").read_text()
    config = re.search(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1]
    config = config.replace(":443", f":{free_port}", 1).replace("127.0.0.1:8443", f"127.0.0.1:{site.port}")
    process = front("haproxy", tmp_path, config, free_port)
    try:
        until("HAProxy accepts", lambda: accepts(free_port))
        asked = ask_from_elsewhere(f"https://apps.test:{free_port}", authority.path, tmp_path / "cookies")
        assert asked == f"127.0.0.2 https apps.test:{free_port} over HTTP/1.1"
    finally:
        process.kill()
        process.wait(10)


def accepts(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def ask_from_elsewhere(url, authority, cookies):
    """Sign in as a program at another address that forges all fields; return address, scheme and host that the app got."""
    command = [
        "curl", "-sSf", "--http2", "--interface", "127.0.0.2", "--noproxy", "*", "--cacert", authority,
        "--resolve", url.removeprefix("https://") + ":127.0.0.1", "-b", cookies, "-c", cookies,
        "-H", "X-Forwarded-For: 192.0.2.66", "-H", "X-Forwarded-Host: evil.test", "-H", "X-Forwarded-Port: 666",
        "-H", "X-Forwarded-Proto: http",
    ]  # fmt: skip
    who = json.dumps({"user": "alice", "password": PASSWORD})
    subprocess.run(
        [*command, "-H", "Content-Type: application/json", "-d", who, f"{url}/auth/login"],
        check=True,
        capture_output=True,
    )
    asked = [*command, "-w", " over HTTP/%{http_version}", f"{url}/client"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout


def answers(page, url):
    from playwright.sync_api import Error

    try:
        return page.goto(url).status == 200
    except Error:
        return False


def test_over_http_1_1_a_browser_has_connections_for_six_streams_only(site_with, person):
    """What the documentation says about the proxy without another one in front of it."""
    site = site_with(APP, people=("alice",))
    page = person()
    site.sign_in(page, "alice")
    expect(page.locator("#ticks")).to_contain_text("tick")
    for _ in range(5):
        tab = page.context.new_page()
        tab.goto(site.url)
        expect(tab.locator("#ticks")).to_contain_text("tick")
    seventh = page.context.new_page()
    with pytest.raises(TimeoutError):
        seventh.goto(site.url, timeout=3000)
    page.context.pages[0].close()  # then the navigation, which goes on after the time-out of `goto`, is completed
    expect(seventh.locator("#ticks")).to_contain_text("tick")
