"""A network behind this host, for tests of what agents reach."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading


class Outside:
    """A network namespace that is routed behind this host, with one listener in it.

    :param also: more addresses that it has.
    """

    address, port = "198.18.77.2", 7777

    def __init__(self, *also):
        self.also = also

    def __enter__(self):
        self.name = f"outside{os.getpid()}"
        link = f"vo{os.getpid()}"
        run = lambda *words: subprocess.run(words, check=True, capture_output=True, timeout=20)
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        run("ip", "addr", "add", "198.18.77.1/30", "dev", link)
        run("ip", "link", "set", link, "up")
        run("ip", "-n", self.name, "addr", "add", f"{self.address}/30", "dev", "eth0")
        run("ip", "-n", self.name, "link", "set", "eth0", "up")
        run("ip", "-n", self.name, "link", "set", "lo", "up")
        run("ip", "addr", "add", "fd77:2::1/64", "dev", link, "nodad")
        run("ip", "-n", self.name, "addr", "add", "fd77:2::2/64", "dev", "eth0", "nodad")
        run("ip", "-n", self.name, "route", "add", "default", "via", "198.18.77.1")
        run("ip", "-n", self.name, "route", "add", "default", "via", "fd77:2::1")
        for one in self.also:
            run("ip", "-n", self.name, "addr", "add", one, "dev", "lo")
            run("ip", "route", "add", one, "via", "fd77:2::2" if ":" in one else self.address)
        code = f"import socket; s = socket.create_server(('::', {self.port}), family=socket.AF_INET6, dualstack_ipv6=True); print('up', flush=True)\nwhile True: s.accept()[0].close()"
        self.server = subprocess.Popen(
            ["ip", "netns", "exec", self.name, sys.executable, "-c", code], stdout=subprocess.PIPE
        )
        assert self.server.stdout.readline() == b"up\n"
        self.link = link
        return self

    def __exit__(self, *error):
        self.server.kill()
        self.server.stdout.close()
        self.server.wait()
        subprocess.run(["ip", "netns", "del", self.name], check=False)
        subprocess.run(["ip", "link", "del", self.link], check=False, capture_output=True)


def serve_names(address, number):
    """Answer DNS queries at an address, over UDP and TCP, with 203.0.113.NUMBER."""

    def answer(query):
        head = query[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + query[12 : query.index(b"\0", 12) + 5]
        return head + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xcb\0\x71" + bytes([number])

    def serve_udp():
        while True:
            query, peer = udp.recvfrom(512)
            udp.sendto(answer(query), peer)

    def serve_tcp():
        while True:
            with tcp.accept()[0] as sock:
                query = sock.recv(512)
                sock.sendall(len(answer(query[2:])).to_bytes(2, "big") + answer(query[2:]))

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    udp = socket.socket(family, socket.SOCK_DGRAM)
    udp.bind((address, 53))
    tcp = socket.create_server((address, 53), family=family)
    for serve in (serve_udp, serve_tcp):
        threading.Thread(target=serve, daemon=True).start()
