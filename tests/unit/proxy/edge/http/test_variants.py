"""The compiled and the interpreted form of the edge's HTTP modules: the same answers to the same bytes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.proxy.edge.http import fields as field_lines
from dispatcher.proxy.edge.http.field_names import REQUEST_NAMES, RESPONSE_NAMES, SHARED_NAMES, BadHead
from dispatcher.proxy.edge.http.fields import COMPILED, read_fields, scan_fields
from tests.unit.proxy.edge.http.test_http import BAD_ANSWERS, LONGER, REFUSED

pytestmark = pytest.mark.timeout(300 * LONGER)

ROOT = Path(__file__).resolve().parents[5]
NAMES = [
    *("Host", "host", "HOST", "Cookie", "cOOkie", "Content-Length", "Content_Length", "Transfer-Encoding", "TE", "Accept"),
    *("X-Forwarded-For", "x_forwarded_for", "X-Forwarded-Anything", "X-Dispatcher-User", "Remote_User", "Sec-Fetch-Mode"),
    *("X-A", "X_A", "a", "Set-Cookie", "Date", "date", "Content-Type", "Connection", "Keep-Alive", "NEL", "Proxy", "X" * 70),
    *("X-Forwarded-" + "y" * 60, "Upgrade", "Strict-Transport-Security", "Client-Ip", "Origin", "User-Agent", "", " a", "a "),
    *("CDN-Cache-Control", "cdn_cache_control", "x" * 70 + "-cache-control", "X-Accel-Redirect", "X-Accel-Buffering"),
]  # fmt: skip
VALUES = [
    "",
    "a",
    " a ",
    "\t a\t \t",
    "a:b",
    ":",
    "5",
    "chunked",
    "a b",
    "\xe9",
    "\x7f",
    "\0",
    "a\rb",
    "a\nb",
    "\r",
    "\n",
    " \t ",
]


def outcome(read, head: bytes, names) -> object:
    try:
        fields = read(head, head.find(b"\r\n") + 2, 20, names)
    except BadHead as error:
        return error.status, error.why
    return fields.lines.split(b"\r\n")[:-1], fields.special


def heads() -> list[bytes]:
    """Return heads of all kinds: what the other tests refuse, and what a seeded generator makes of odd parts."""
    rng = random.Random(1)
    made = [*(head for head, _ in REFUSED.values()), *BAD_ANSWERS.values()]
    for _ in range(3000):
        lines = [
            f"{rng.choice(NAMES)}{rng.choice([':', ': ', ':', ''])}{rng.choice(VALUES)}"
            for _ in range(rng.randrange(8))
        ]
        made.append("\r\n".join(["GET / HTTP/1.1", *lines, "", ""]).encode("latin-1"))
    return [head[: head.find(b"\r\n\r\n") + 4] for head in made]


@pytest.mark.parametrize(
    "names", [REQUEST_NAMES, RESPONSE_NAMES, SHARED_NAMES], ids=["requests", "answers", "shared"]
)
def test_both_readers_of_fields_say_the_same(names):
    # `scan_fields` is a loop over bytes, and right in the interpreter too, only slow.
    good = 0
    for head in heads():
        expected = outcome(read_fields, head, names)
        assert outcome(scan_fields, head, names) == expected, head
        good += isinstance(expected[0], list) and len(expected[0]) > 0
    assert good > 100, "hardly a head was valid"


@settings(max_examples=300 * LONGER, deadline=None)
@given(st.binary(max_size=120), st.booleans())
def test_both_readers_say_the_same_about_noise(noise, named):
    head = b"GET / HTTP/1.1\r\n" + (b"Host: a\r\nX-" if named else b"") + noise + b"\r\n\r\n"
    head = head[: head.find(b"\r\n\r\n") + 4]
    expected = outcome(read_fields, head, REQUEST_NAMES)
    assert outcome(scan_fields, head, REQUEST_NAMES) == expected


def test_the_unit_tests_pass_on_the_interpreted_modules_too():
    folder = Path(__file__).parent
    environment = {**os.environ, "DISPATCHER_PURE": "1", "PYTEST_ADDOPTS": "", "EDGE_FUZZ": "1"}
    said = subprocess.run(
        [sys.executable, "-c", "from dispatcher.proxy.edge.http import fields, request; print(fields.COMPILED, request.__file__)"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said.startswith("False ") and said.endswith(".py\n"), said
    if os.environ.get("CI") == "true" and "DISPATCHER_PURE" not in os.environ:
        assert COMPILED, "the compilation failed: see the output of `pip install -v -e .`"
    if COMPILED:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", folder / "test_http.py"],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout


def test_modules_changed_after_they_were_compiled_are_interpreted(tmp_path):
    package = tmp_path / "dispatcher/proxy/edge/http"
    package.mkdir(parents=True)
    for folder in (package.parents[2], package.parents[1], package):
        (folder / "__init__.py").touch()
    edge = Path(field_lines.__file__).parents[1] / "__init__.py"
    (package.parent / "__init__.py").write_text(edge.read_text())
    (package / "fields.py").write_text("VALUE = 'interpreted'\n")
    from importlib.machinery import EXTENSION_SUFFIXES

    compiled = package / f"fields{EXTENSION_SUFFIXES[0]}"
    compiled.write_bytes(b"not a module of machine code: importing it fails")
    (tmp_path / "setup.py").touch()
    (tmp_path / "dispatcher_edge__mypyc.py").touch()  # the common library, absent where nothing was compiled

    def value() -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from dispatcher.proxy.edge.http import fields; print(fields.VALUE)"
        environment = {key: text for key, text in os.environ.items() if key != "DISPATCHER_PURE"}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )

    os.utime(compiled, (1, 1))
    assert value().stdout == "interpreted\n"
    os.utime(package / "fields.py", (1, 1))
    os.utime(package / "__init__.py", (1, 1))
    os.utime(compiled, (2, 2))
    assert "ImportError" in value().stderr
