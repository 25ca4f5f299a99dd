"""The tests' own browser: no request fails when another test makes a network interface (tests/support/steady_chromium.py)."""

import http.server
import subprocess
import threading
import time

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.root]

#: More requests at a time than Chromium makes connections, so that some wait for one: those it would give up.
REQUESTS = """async () => {
  const failed = [];
  const get = (n) => fetch("/" + n).then((answer) => answer.text()).catch((error) => failed.push(String(error)));
  await Promise.all([...Array(60).keys()].map(get));
  return failed;
}"""


class Slow(http.server.BaseHTTPRequestHandler):
    busy = threading.Event()

    def do_GET(self):
        if self.path != "/":
            self.busy.set()
            time.sleep(0.2)
        self.send_response(204 if self.path != "/" else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_no_request_fails_when_the_host_gets_an_interface(person, url):
    page = person()
    page.goto(url)

    def change():
        Slow.busy.wait(20)
        subprocess.run(["ip", "link", "add", "dtest0", "type", "veth", "peer", "name", "dtest1"], check=True)
        try:
            for command in ("link set dtest1 up", "link set dtest0 up", "address add 198.18.201.1/24 dev dtest0"):
                subprocess.run(["ip", *command.split()], check=True)
            time.sleep(0.5)
        finally:
            subprocess.run(["ip", "link", "delete", "dtest0"], check=True)

    changing = threading.Thread(target=change)
    changing.start()
    failed = page.evaluate(REQUESTS)
    changing.join()
    assert failed == []
