"""The provider in examples/dispatcher-runc, a distribution of its own: loaded, used, and judged by the kit."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.installation import Installation, until

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


def test_agents_of_the_product_outlive_its_manager(project, short_tmp, monkeypatch):
    """Used through the proxy: adopted after `kill -9`, woken from suspension, its end told, nothing left."""
    monkeypatch.setenv("PYTHONPATH", str(project / "site"))
    apps = (
        '[apps.web]\nprovider = "runc"\n[apps.web.runc]\n'
        'command = ["/usr/bin/python3", "{app}", "{{socket}}"]\nread_only = ["{app}"]\n'
    )
    with Installation(short_tmp, apps) as site:
        for daemon in ("manager", "proxy"):
            site.start(daemon)
        site.add("ada")
        cookie = site.login("ada")
        assert site.app(cookie, "/count")["count"] == 1
        site.kill("manager")
        assert site.app(cookie, "/count")["count"] == 2, "the agent runs without a manager"
        site.start("manager")
        assert site.admin("PUT", "/agents/ada/state?wait=20", {"state": "suspended"}).status == 200
        name = next(short_tmp.glob("state/**/dispatcher-*-ada-*")).name
        groups = Path("/sys/fs/cgroup")
        frozen = [*groups.glob(f"freezer/{name}/freezer.state"), *groups.glob(f"{name}/cgroup.freeze")]
        assert [path.read_text().strip() for path in frozen] in (["FROZEN"], ["1"])
        site.web("POST", "/", Cookie=cookie, Origin=f"http://127.0.0.1:{site.port}")
        assert site.app(cookie, "/count")["count"] == 3, "woken by a request, its memory kept"
        site.web("GET", "/exit", Cookie=cookie)
        until("its end is told", lambda: "exit code 3" in str(site.admin("GET", "/agents/ada/why").json()))
        assert site.app(cookie, "/count")["count"] == 1, "started again"
        assert site.admin("DELETE", "/agents/ada?wait=20").status == 204
        assert not [*groups.glob(name), *groups.glob(f"*/{name}")]


def test_the_kit_is_satisfied(project):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "test_runc.py"]
    done = run(project, *command, timeout=290)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 95 and "skipped" not in done.stdout, done.stdout[-500:]


#: crun refuses control groups of both versions: in a mount namespace of its own, only those of version 1 are there.
ONE_VERSION = """
set -e
if [ -d /sys/fs/cgroup/unified ]; then
    mkdir groups
    mount -t tmpfs none groups
    for each in $(ls /sys/fs/cgroup); do
        if [ -L /sys/fs/cgroup/$each ]; then cp -a /sys/fs/cgroup/$each groups
        elif [ $each != unified ]; then mkdir groups/$each; mount --rbind /sys/fs/cgroup/$each groups/$each; fi
    done
    mount --rbind groups /sys/fs/cgroup
fi
exec "$@"
"""


@pytest.mark.program("crun")
def test_crun_passes_checks_of_each_kind(project, monkeypatch):
    monkeypatch.setenv("RUNTIME", "crun")
    checks = "ensure_runs or exit_is_reported or sleep_keeps or memory_limit or destroy_leaves or no_privileges"
    command = ["unshare", "--mount", "sh", "-c", ONE_VERSION, "sh", sys.executable, "-m", "pytest", "-q"]
    done = run(
        project, *command, "-p", "no:cacheprovider", "-W", "error", "test_runc.py", "-k", checks, timeout=120
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 6 and "skipped" not in done.stdout, done.stdout[-500:]
