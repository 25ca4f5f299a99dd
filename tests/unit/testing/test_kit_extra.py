"""A plugin's tests need pytest and pytest-timeout beside the program: the extra `kit`."""

import re
import runpy
import subprocess
import sys

import pytest
import setuptools

from tests.conftest import ROOT

CODE = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # its import fails
import dispatcher.testing
"""


@pytest.fixture
def extras(monkeypatch):
    made = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: made.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return {
        extra: {re.match(r"[\w.-]+", line)[0] for line in lines} for extra, lines in made["extras_require"].items()
    }


def test_the_extra_has_two_packages(extras):
    assert extras["kit"] == {"pytest", "pytest-timeout"}


def test_the_kit_imports_no_more(extras):
    absent = {name.replace("-", "_") for name in extras["testing"] | extras["all"]} - {"pytest", "pytest_timeout"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *absent, "xdist", "libvirt"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
