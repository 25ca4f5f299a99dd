"""The provider in examples/dispatcher-runc, a distribution of its own: loaded, used, and judged by the kit."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

EXAMPLE = ROOT / "examples/dispatcher-runc"
pytestmark = [pytest.mark.root, pytest.mark.program("runc", "tini")]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The example, installed into a directory of its own as `pip install --no-deps` does, without a build backend."""
    root = tmp_path_factory.mktemp("third-party")
    site = root / "site"
    shutil.copytree(EXAMPLE / "dispatcher_runc", site / "dispatcher_runc")
    shutil.copy(EXAMPLE / "test_runc.py", root)
    tables = (EXAMPLE / "pyproject.toml").read_text()
    assert '[project.entry-points."dispatcher.plugins"]\nrunc = "dispatcher_runc"\n' in tables
    info = site / "dispatcher_runc-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dispatcher-runc\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dispatcher.plugins]\nrunc = dispatcher_runc\n")
    return root


def run(project, *command, timeout=60):
    env = {**os.environ, "PYTHONPATH": str(project / "site"), "PYTEST_ADDOPTS": ""}
    for name in list(env):
        if name.startswith("PYTEST_XDIST") or name == "PYTEST_CURRENT_TEST":
            del env[name]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=timeout)


def test_it_is_loaded_and_used_like_a_built_in(project):
    (project / "d.toml").write_text('[apps.a]\nprovider = "runc"\n[apps.a.runc]\ncommand = ["sleep", "{port}"]\n')
    dispatcher = [sys.executable, "-m", "dispatcher", "--config", "d.toml"]
    done = run(project, *dispatcher, "providers", "check", "runc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Each agent has a host user id of its own, without a user namespace" in " ".join(done.stdout.split())
    done = run(project, *dispatcher, "config", "check")
    assert "apps.a.runc.command: there is no {port}" in " ".join((done.stdout + done.stderr).split())


def test_the_kit_is_satisfied(project):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "test_runc.py"]
    done = run(project, *command, timeout=290)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 95 and "skipped" not in done.stdout, done.stdout[-500:]
