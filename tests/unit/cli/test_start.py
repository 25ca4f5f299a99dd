"""The command line starts fast: what it must not import before it is needed, and how long it takes."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.support.fake_manager import FakeManager

HEAVY = {"pydantic", "sqlalchemy", "flask", "werkzeug", "rich", "importlib.metadata", "pluggy", "asyncio", "uvloop",
         "h11", "waitress", "cryptography", "argon2", "structlog", "psutil", "jinja2"}  # fmt: skip

PROBE = """
import sys
from dispatcher.cli import main
code = main(sys.argv[1:])
print("MODULES", *sys.modules, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["list"], ["running"], ["info", "alice"], ["start", "alice"], ["stop", "alice"], ["why", "alice"],
     ["logs", "alice"], ["start", "--help"], ["remove", "-y", "alice"], ["zzz"]],
    ids=" ".join,
)  # fmt: skip
def test_client_commands_import_nothing_heavy(short_tmp, arguments):
    with FakeManager(short_tmp / "m") as manager:
        manager.add("alice")
        env = {**os.environ, "DISPATCHER_MANAGER": manager.url}
        done = subprocess.run([sys.executable, "-c", PROBE, *arguments], env=env, capture_output=True, text=True)
    imported = set(done.stderr.partition("MODULES ")[2].split())
    assert "dispatcher.cli" in imported, done.stderr
    allowed = {"importlib.metadata"} if "urllib3" in imported else set()  # imported by urllib3 itself
    assert imported & HEAVY <= allowed
    assert "--help" not in arguments or "urllib3" not in imported


@pytest.mark.xdist_group("timing")
def test_the_bounds_on_starting_hold():
    """Three tries, as a busy machine slows whom it likes."""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, ROOT / "bench/cli_start", "--runs", "5", "--json"], capture_output=True, text=True
        )
        if done.returncode == 0:
            break
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
