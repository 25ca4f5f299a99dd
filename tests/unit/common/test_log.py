"""Logs: one line an event, nothing that forges another, no secret, bounded."""

from __future__ import annotations

import io
import json
import logging

import pytest

from dispatcher.common import log as logs


NASTY = [
    "alice\n2026-01-01T00:00:00Z INFO signed in user=root",
    "\x1b[31mred\x1b[0m\x07",
    "a\r\nb\x00c\x85d\u2028e\u202ef",
    "x" * 10_000_000,
]


@pytest.mark.parametrize("format", ["console", "json"])
@pytest.mark.parametrize("text", NASTY, ids=["newline", "ansi", "controls", "10MB"])
def test_what_others_chose_stays_one_bounded_line(log_output, format, text):
    logs.configure("info", format, log_output)
    logs.logger("manager").info("signing in", user=text)
    logging.getLogger("dispatcher.plugin.provider").warning("agent %s", text)
    logs.logger("manager").info(text)
    lines = log_output.getvalue().splitlines()
    assert len(lines) == 3
    assert all(char.isprintable() for line in lines for char in line)
    assert all(len(line) < 5000 for line in lines)


@pytest.mark.parametrize("format", ["console", "json"])
def test_no_secret_is_written(log_output, format):
    logs.configure("info", format, log_output)
    log = logs.logger("manager")
    log.info("x", password="hunter22", new_password="hunter22", token="hunter22", Authorization="Bearer hunter22")
    log.info("x", body={"password": "hunter22", "deep": [{"cookie": "hunter22"}]}, device="hunter22")
    log.info("x", url="https://alice:hunter22@host/?next=/&password=hunter22&a=b")
    log.info('x {"password": "hunter22"} token=hunter22; Authorization: Bearer hunter22')
    logging.getLogger("other").error("failed with password='hunter22'")
    log.info("wrong name or password", user="dsp_hunter22hunter22hunter22hunter22hunter22xxx")
    try:
        raise ValueError("password=hunter22")
    except ValueError:
        log.exception("failed")
    text = log_output.getvalue()
    assert "hunter22" not in text
    assert "a=b" in text
    assert "ValueError" in text


def test_a_word_after_passwords_is_no_secret(log_output):
    logs.configure("info", "console", log_output)
    logs.logger("manager").error("failed", why="The server cannot verify passwords: Connection refused")
    assert "passwords: Connection refused" in log_output.getvalue()


def test_a_trace_cannot_forge_a_line(log_output):
    logs.configure("info", "console", log_output)
    try:
        raise RuntimeError("boom\n2026-01-01T00:00:00Z INFO all is well\x1b[2J")
    except RuntimeError:
        logs.logger("manager").exception("failed")
    first, *rest = log_output.getvalue().splitlines()
    assert "failed" in first
    assert rest
    assert all(line.startswith("    | ") for line in rest)
    assert "\x1b" not in log_output.getvalue()


def test_json_is_one_object_a_line_with_the_members(log_output):
    logs.configure("info", "json", log_output)
    logs.logger("manager").info("listening", address="unix:/x", port=7)
    record = json.loads(log_output.getvalue())
    assert record["event"] == "listening"
    assert record["address"] == "unix:/x"
    assert record["port"] == 7
    assert record["level"] == "info"
    assert record["timestamp"]


def test_levels(log_output):
    logs.configure("warning", "console", log_output)
    logs.logger("manager").info("quiet")
    logging.getLogger("sqlalchemy.engine").info("quiet")
    logs.set_level("info")
    logs.logger("manager").info("loud")
    logging.getLogger("sqlalchemy.engine").info("quiet")
    assert log_output.getvalue().count("loud") == 1
    assert "quiet" not in log_output.getvalue()


@pytest.mark.usefixtures("log_output")
def test_a_full_disk_does_not_fail_what_is_logged():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    root = logging.getLogger()
    before = root.handlers[:]
    try:
        logs.configure("info", "console", Full())
        logs.logger("manager").info("hello")
    finally:
        root.handlers[:] = before
        logging.raiseExceptions = True
