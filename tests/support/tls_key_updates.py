"""A TLS client that sends KeyUpdate messages (RFC 8446, 4.6.3) and nothing else, as fast as it can.

Python's ssl does not offer them, so it calls OpenSSL's library.  Arguments: port on 127.0.0.1, seconds, number of connections.
"""

import ctypes
import socket
import sys
import threading
import time

library = ctypes.CDLL("libssl.so.3")
POINTER = ctypes.c_void_p
for name, arguments in {
    "SSL_CTX_new": [POINTER],
    "SSL_new": [POINTER],
    "SSL_set_fd": [POINTER, ctypes.c_int],
    "SSL_connect": [POINTER],
    "SSL_key_update": [POINTER, ctypes.c_int],
    "SSL_do_handshake": [POINTER],
}.items():
    getattr(library, name).argtypes = arguments
for name in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
    getattr(library, name).restype = POINTER


def flood(seconds: float) -> None:
    sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    connection = library.SSL_new(library.SSL_CTX_new(library.TLS_client_method()))
    library.SSL_set_fd(connection, sock.fileno())
    assert library.SSL_connect(connection) == 1
    end = time.monotonic() + seconds
    while time.monotonic() < end and library.SSL_key_update(connection, 1) == 1:
        if library.SSL_do_handshake(connection) != 1:
            break


threads = [threading.Thread(target=flood, args=[float(sys.argv[2])]) for _ in range(int(sys.argv[3]))]
for thread in threads:
    thread.start()
