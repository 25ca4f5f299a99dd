"""A trivial app that starts in a few milliseconds: answers every request on a Unix socket with its pid.

Run as ``python3 -I -S trivial_app.py SOCKET``.  Uses C modules only, so that what a benchmark measures is the
dispatcher and not an app's imports.
"""

import _socket
import posix
import sys

listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
posix.umask(0o007)
listener.bind(sys.argv[1])
listener.listen(64)
body = b"%d\n" % posix.getpid()
reply = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
    len(body),
    body,
)
while True:
    fd, _ = listener._accept()
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
    head = b""
    while b"\r\n\r\n" not in head:
        part = connection.recv(65536)
        if not part:
            break
        head += part
    if head:
        connection.sendall(reply)
    connection.close()
