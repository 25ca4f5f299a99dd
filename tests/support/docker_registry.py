"""A small container registry for tests: serves images that `docker save` wrote, with a password, slowly if asked.

Speaks as much of the distribution protocol as a pull needs.  The engine takes plain HTTP from 127.0.0.1.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


class Registry:
    """Images by name; blobs by digest."""

    def __init__(self, credentials: str = "") -> None:
        self.credentials = credentials
        self.manifests: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.seconds = 0.0  # that one blob takes
        self.requests: list[str] = []
        handler = type("BoundHandler", (_Handler,), {"registry": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"

    def push(self, local: str, name: str) -> str:
        """Take an image from the machine's engine as `name` (REPOSITORY:TAG); return its manifest's digest."""
        saved = subprocess.run(["docker", "save", local], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(saved)) as tar:
            (described,) = json.load(tar.extractfile("manifest.json"))
            config = tar.extractfile(described["Config"]).read()
            layers = [tar.extractfile(one).read() for one in described["Layers"]]
        return self.put(config, layers, name)

    def put(self, config: bytes, layers: list[bytes], name: str) -> str:
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self._blob(config, "application/vnd.docker.container.image.v1+json"),
            "layers": [self._blob(one, "application/vnd.docker.image.rootfs.diff.tar") for one in layers],
        }
        body = json.dumps(manifest).encode()
        digest = "sha256:" + hashlib.sha256(body).hexdigest()
        repository, _, tag = name.partition(":")
        self.manifests[f"{repository}/{tag}"] = self.manifests[f"{repository}/{digest}"] = body
        return digest

    def _blob(self, content: bytes, kind: str) -> dict:
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return {"mediaType": kind, "size": len(content), "digest": digest}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    registry: Registry
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        registry = self.registry
        registry.requests.append(self.path)
        wanted = "Basic " + base64.b64encode(registry.credentials.encode()).decode()
        if registry.credentials and self.headers.get("Authorization") != wanted:
            self._answer(401, b"{}", "application/json", {"WWW-Authenticate": 'Basic realm="test"'})
            return
        parts = self.path.strip("/").split("/")
        if parts == ["v2"]:
            self._answer(200, b"{}", "application/json")
        elif "manifests" in parts:
            at = parts.index("manifests")
            found = registry.manifests.get(f"{'/'.join(parts[1:at])}/{parts[at + 1]}")
            if found is None:
                body = b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}'
                self._answer(404, body, "application/json")
            else:
                digest = "sha256:" + hashlib.sha256(found).hexdigest()
                self._answer(200, found, MANIFEST, {"Docker-Content-Digest": digest})
        elif "blobs" in parts and parts[-1] in registry.blobs:
            self._answer(200, registry.blobs[parts[-1]], "application/octet-stream", seconds=registry.seconds)
        else:
            self._answer(404, b"{}", "application/json")

    def _answer(self, status, body, kind, headers=None, seconds=0.0) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        pieces = 20 if seconds else 1
        size = max(1, -(-len(body) // pieces))
        try:
            for start in range(0, len(body), size):
                self.wfile.write(body[start : start + size])
                self.wfile.flush()
                time.sleep(seconds / pieces)
        except OSError:
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass
