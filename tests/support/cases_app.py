"""An app that does as it is told: answers byte by byte as asked, WebSockets, endless streams, tricks with its socket.

It runs as an agent, on the standard library alone.  ``CASE_*`` in its environment say how it starts.
"""

import base64
import hashlib
import json
import os
import socket
import sys
import threading
import time

STARTED = time.monotonic()
PATH = sys.argv[1]
MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
seen: list[str] = []  # targets of all requests, the health check's left out
early: list[str] = []  # those that came before the app said that it is ready
deaf_until = 0.0


def env(name: str, default: float = 0.0) -> float:
    return float(os.environ.get(name, default))


class Client(threading.Thread):
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.sock, self.buffer = sock, b""

    def run(self) -> None:
        try:
            while self.serve():
                pass
        except OSError:
            pass
        self.sock.close()

    def more(self) -> bool:
        data = self.sock.recv(1 << 18)
        self.buffer += data
        return bool(data)

    def take(self, size: int) -> bytes:
        while len(self.buffer) < size:
            if not self.more():
                raise OSError("the end")
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def serve(self) -> bool:
        while b"\r\n\r\n" not in self.buffer:
            if not self.more():
                return False
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.method, self.target, _ = first.split(" ")
        self.fields = [[name, value.strip()] for name, _, value in (line.partition(":") for line in lines)]
        self.named = {name.lower(): value for name, value in self.fields}
        path, _, query = self.target.partition("?")
        ready = env("CASE_READY_AFTER")
        if path == "/health":
            status = 200 if time.monotonic() - STARTED >= ready else 503
            return self.answer({"healthy": status}, status)
        seen.append(self.target)
        if time.monotonic() - STARTED < ready:
            early.append(self.target)
        length, digest = self.body()
        part = [piece for piece in path.split("/") if piece]
        act = getattr(self, "do_" + part[0], None) if part else None
        if act is not None:
            return act(part[1:], query)
        return self.answer({"length": length, "sha256": digest})

    def body(self) -> tuple[int, str]:
        if self.named.get("expect") == "100-continue":
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        digest, length = hashlib.sha256(), 0
        if self.named.get("transfer-encoding") == "chunked":
            while True:
                while b"\r\n" not in self.buffer:
                    if not self.more():
                        raise OSError("the end")
                line, _, self.buffer = self.buffer.partition(b"\r\n")
                size = int(line, 16)
                data = self.take(size + 2)[:-2]
                if not size:
                    return length, digest.hexdigest()
                digest.update(data)
                length += size
        left = int(self.named.get("content-length", 0))
        while left:
            data = self.take(min(left, max(1, len(self.buffer))))
            digest.update(data)
            length, left = length + len(data), left - len(data)
        return length, digest.hexdigest()

    def answer(self, more: object, status: int = 200) -> bool:
        facts = {
            "pid": os.getpid(), "uid": os.getuid(), "method": self.method, "target": self.target,
            "headers": self.fields, **more,
        }  # fmt: skip
        body = json.dumps(facts).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.sock.sendall(head.encode() + (b"" if self.method == "HEAD" else body))
        return True

    # What one may ask for.

    def do_seen(self, part, query):
        return self.answer({"seen": seen, "early": early})

    def do_raw(self, part, query):
        self.sock.sendall(bytes.fromhex(part[0]))
        return True

    def do_exit(self, part, query):
        os._exit(3)

    def do_write(self, part, query):
        with open(part[0], "w") as file:
            file.write(query)
        return self.answer({"files": os.listdir(".")})

    def do_files(self, part, query):
        return self.answer({"files": sorted(os.listdir("."))})

    def do_link(self, part, query):
        """Put a link to another path in the place of the own socket."""
        os.rename(PATH, PATH + ".real")
        os.symlink(bytes.fromhex(part[0]), PATH)
        return self.answer({})

    def do_deaf(self, part, query):
        """Answer nobody for so many seconds."""
        global deaf_until
        self.answer({})
        deaf_until = time.monotonic() + float(part[0])
        return False

    def do_noise(self, part, query):
        """Print so many megabytes, beginning a moment later."""

        def shout() -> None:
            time.sleep(float(query or 0))
            line = "x" * 1023 + "\n"
            for _ in range(int(part[0])):
                sys.stdout.write(line * 1024)
            print("the last line", flush=True)
            self_done.append(1)

        threading.Thread(target=shout, daemon=True).start()
        return self.answer({})

    def do_quiet(self, part, query):
        return self.answer({"done": len(self_done)})

    def do_download(self, part, query):
        size = int(part[0])
        self.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        block = b"d" * (1 << 18)
        while size > 0:
            self.sock.sendall(block[:size])
            size -= len(block)
            if part[1:] == ["slow"]:
                time.sleep(0.1)
        return True

    def do_sse(self, part, query):
        self.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        text = b"data: " + b"e" * int(query or 1) + b"\n\n"
        while True:
            self.sock.sendall(text)
            time.sleep(0.2)

    def do_ws(self, part, query):
        """Echo text frames."""
        if "sec-websocket-key" not in self.named:
            return self.answer({"error": "no upgrade"}, 426)
        accept = base64.b64encode(hashlib.sha1(self.named["sec-websocket-key"].encode() + MAGIC).digest())
        self.sock.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        while True:
            kind, size = self.take(2)
            size &= 127
            if size > 125:
                size = int.from_bytes(self.take(2 if size == 126 else 8), "big")
            mask = self.take(4)
            data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(self.take(size)))
            if kind & 15 == 8:
                return False
            self.sock.sendall(bytes([0x8A if kind & 15 == 9 else kind, size]) + data)


self_done: list[int] = []


def main() -> None:
    if "CASE_LAST_WORDS" in os.environ:
        print(os.environ["CASE_LAST_WORDS"], flush=True)
        sys.exit(3)
    if os.environ.get("CASE_STDIN"):
        print("got", len(sys.stdin.buffer.read()), flush=True)
    time.sleep(env("CASE_SLOW_START"))
    os.umask(0o007)
    server = socket.socket(socket.AF_UNIX)
    server.bind(PATH)
    server.listen(256)
    while True:
        sock, _ = server.accept()
        time.sleep(max(0.0, deaf_until - time.monotonic()))
        Client(sock).start()


if __name__ == "__main__":
    main()
