"""Listeners on an agent's port."""

import os
import socket

from dispatcher_subprocess import observe
from dispatcher_subprocess.processes import procfs


TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:4E20 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0 100 0 0 10 0
   1: 00000000:4E20 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 222 1 0 100 0 0 10 0
   2: 0100007F:4E20 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 333 1 0 100 0 0 10 0
   3: 0200000A:4E20 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 444 1 0 100 0 0 10 0
   4: 0100007F:4E21 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 555 1 0 100 0 0 10 0
"""


def test_listeners_that_a_connection_to_loopback_could_reach(monkeypatch):
    monkeypatch.setattr(procfs, "read", lambda path: TCP.encode() if path.endswith("/tcp") else b"header\n")
    assert observe.listening(20000) == {111, 222}
    assert observe.listening(20001) == {555}
    assert observe.listening(1) == frozenset()


def test_a_port_is_an_agents_own_only_if_it_has_all_listeners_open(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        inodes = frozenset(os.fstat(each.fileno()).st_ino for each in (one, two))
        assert observe.belongs(inodes, [os.getpid()])
        assert not observe.belongs(inodes | {1}, [os.getpid()])
        assert not observe.belongs(inodes, [])
