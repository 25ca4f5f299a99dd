"""The provider of docs/howto/write-a-provider.md works as it stands: installed and loaded.

tests/integration/test_plugin_new.py runs the kit on it.
"""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs/howto/write-a-provider.md"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The files of the page, installed as a distribution into a directory of their own."""
    root = tmp_path_factory.mktemp("third-party")
    blocks = re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert [name for name, _ in blocks] == ["pyproject.toml", "dispatcher_bare.py", "test_bare.py"]
    for name, text in blocks:
        (root / name).write_text(text)
    # What `pip install --no-deps` leaves behind, without asking anybody for a build backend.
    site = root / "site"
    site.mkdir()
    (root / "dispatcher_bare.py").rename(site / "dispatcher_bare.py")
    info = site / "dispatcher_bare-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dispatcher-bare\nVersion: 1.0\n")
    tables = (root / "pyproject.toml").read_text()
    assert '[project.entry-points."dispatcher.plugins"]\nbare = "dispatcher_bare"\n' in tables
    (info / "entry_points.txt").write_text("[dispatcher.plugins]\nbare = dispatcher_bare\n")
    return root


def run(project, *command):
    env = {**os.environ, "PYTHONPATH": str(project / "site"), "PYTEST_ADDOPTS": ""}
    for name in list(env):
        if name.startswith("PYTEST_XDIST") or name == "PYTEST_CURRENT_TEST":
            del env[name]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=240)


def test_it_is_found_like_a_built_in(project):
    done = run(project, sys.executable, "-m", "dispatcher", "providers", "schema", "bare")
    assert done.returncode == 0, done.stderr
    assert '"apps.APP.bare"' in done.stdout


def test_its_options_are_checked_by_the_configuration(project):
    (project / "d.toml").write_text('[apps.notes]\nprovider = "bare"\n[apps.notes.bare]\ncomand = ["x"]\n')
    done = run(project, sys.executable, "-m", "dispatcher", "--config", "d.toml", "config", "check")
    assert done.returncode == 2
    assert "apps.notes.bare.comand: unknown key, did you mean 'command'?" in done.stderr
