"""An app for guests that runs Python code of requests, as a hostile user's app could.

GET  /   the user's name
POST /   run the body; its output
"""

import http.server
import os
import subprocess
import sys


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a request."""

    def do_GET(self) -> None:
        """The user's name."""
        self._answer(os.environ["DISPATCHER_USER"].encode())

    def do_POST(self) -> None:
        """Run the body."""
        code = self.rfile.read(int(self.headers["Content-Length"]))
        command = [sys.executable, "-I", "-S", "-"]
        self._answer(subprocess.run(command, input=code, stdout=-1, stderr=subprocess.STDOUT, timeout=60).stdout)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


host, _, port = sys.argv[sys.argv.index("--tcp") + 1].rpartition(":")
http.server.ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
