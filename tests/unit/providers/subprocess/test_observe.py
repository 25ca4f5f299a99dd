"""Listeners on an agent's port."""

from dispatcher_subprocess import observe, procfs


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


def test_a_listener_is_judged_once_and_anew_when_it_changes(monkeypatch):
    sockets = {10: {111}, 11: {222}}
    asked = []

    def open_inodes(pid, kind):
        asked.append(pid)
        return iter(sockets.get(pid, ()))

    monkeypatch.setattr(procfs, "open_inodes", open_inodes)
    known = observe.PortOwners()
    assert known.fault("run", frozenset(), lambda: [10]) == "it does not listen yet"
    assert "another process" in known.fault("run", frozenset({111, 333}), lambda: [10, 11])
    assert known.fault("run", frozenset({111}), lambda: [10]) == ""
    asked.clear()
    assert known.fault("run", frozenset({111}), lambda: [10]) == "" and not asked
    assert known.fault("run", frozenset({444}), lambda: [10]) and asked
    known.forget("run")
    assert "another process" in known.fault("other", frozenset({222}), lambda: [10])
