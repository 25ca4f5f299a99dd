"""Listening on an address that the host gets later: by DHCP after the services, by a failover, by a VPN."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent.parent
LISTEN = {
    "proxy": "from dispatcher.proxy.listeners import Listeners\nopened = Listeners()\n"
    "opened.update({'proxy.listen': [ADDRESS]})\n(sock,) = opened.of('proxy.listen')",
    "manager": "from dispatcher.manager.rest.listeners import tcp_socket\nsock = tcp_socket(ADDRESS)\nsock.listen()",
}
#: In a network namespace of its own.
CODE = """
import socket, subprocess, time
ip = lambda words: subprocess.run(["ip", *words.split()], check=True)
ip("link set lo up")
ADDRESS = {listen!r}
{opening}
host, port = {address!r}, 8080
try:
    socket.create_connection((host, port), 2)
except OSError as error:
    print("before:", type(error).__name__)
ip("address add {address}/{length} dev lo" + " nodad" * (":" in host))
end = time.monotonic() + 20
while True:  # the kernel's route to a new address may come a moment later
    try:
        client = socket.create_connection((host, port), 10)
        break
    except OSError:
        if time.monotonic() > end:
            raise
        time.sleep(0.05)
client.sendall(b"x")
sock.settimeout(10)
print("after:", sock.accept()[0].recv(1))
"""


@pytest.mark.root
@pytest.mark.parametrize("who", LISTEN)
@pytest.mark.parametrize(("address", "length"), [("192.0.2.10", 32), ("2001:db8::10", 128)])
def test_it_is_served_once_it_is_there(who, address, length):
    if ":" in address and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    listen = f"[{address}]:8080" if ":" in address else f"{address}:8080"
    code = CODE.format(listen=listen, opening=LISTEN[who], address=address, length=length)
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "before: OSError\nafter: b'x'" in done.stdout, done.stdout + done.stderr
    assert "does not have the address yet" in done.stdout
