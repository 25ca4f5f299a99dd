"""The access log towards a file that takes nothing: lines wait, the oldest first, and cost little."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from dispatcher.proxy.edge.net import access_log
from dispatcher.proxy.edge.net.access_log import AccessLog

LINES = 40_000


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.set_blocking(reader, False)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def write(log, number):
    request = SimpleNamespace(method=b"GET", target=b"/%d" % number)
    exchange = SimpleNamespace(request=request, request_id=b"id", bytes_in=0, bytes_out=0)
    log.write(exchange, None, 200, b"192.0.2.1", None, float(number), 0.0)


def test_a_reader_that_stops_costs_neither_time_nor_order_and_lines_only_above_4_mib(pipe, monkeypatch):
    reader, writer = pipe
    log, attempts = AccessLog(writer), []
    real = os.write
    monkeypatch.setattr(access_log.os, "write", lambda fd, data: attempts.append(len(data)) or real(fd, data))
    for number in range(LINES):
        write(log, number)
    kept = LINES - log.lost
    assert 0 < log.lost < LINES
    assert len(attempts) < 80, "tried again for each 64 KiB, not for each line"
    found = bytearray()
    while found.count(b"\n") < kept:
        log.flush()
        found += os.read(reader, 1 << 20)
    assert [json.loads(line)["path"] for line in found.splitlines()] == [f"/{number}" for number in range(kept)]
    write(log, LINES)
    log.flush()
    assert json.loads(os.read(reader, 65536))["path"] == f"/{LINES}", "it goes on"
