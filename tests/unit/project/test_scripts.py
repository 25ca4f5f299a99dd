"""The shell scripts: correct for bash, clean for shellcheck, executable, and what they promise in their first lines."""

import os
import ast
import importlib.util
import re
import subprocess

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted(
    path
    for folder in ("packaging", "tests/machine", ".ci", "examples", "bench", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.read_bytes()[:2] == b"#!"
)
SHELL = [path for path in SCRIPTS if b"sh" in path.read_bytes().split(b"\n")[0]]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_can_be_run(path):
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.program("shellcheck")
def test_shell_scripts_are_clean(path):
    done = subprocess.run(["shellcheck", "--severity=warning", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "path", [path for path in SHELL if b"bash" in path.read_bytes().split(b"\n")[0]], ids=lambda path: path.name
)
def test_bash_scripts_fail_loudly(path):
    assert "set -euo pipefail" in path.read_text()


def test_make_venv_says_what_is_missing(tmp_path):
    def make(python):
        return subprocess.run(
            [ROOT / "tests/machine/make-venv", python, tmp_path / "v"], capture_output=True, text=True
        )

    done = make("no-such-python")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no-such-python not found" in done.stderr
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.0 && exit\nexit 1\n')
    old.chmod(0o755)
    assert "Python 3.10 or later is required" in make(old).stderr
    bare = tmp_path / "bare-python"
    bare.write_text("#!/bin/sh\ncase $2 in *ensurepip*) exit 1;; esac\nexit 0\n")
    bare.chmod(0o755)
    assert "apt-get install python3-venv" in make(bare).stderr
    assert not (tmp_path / "v").exists()


def test_the_image_s_context_holds_what_is_copied():
    """An engine is needed to build it; a directory that .dockerignore leaves out ends the build."""
    lines = (ROOT / "packaging/container/Dockerfile").read_text().splitlines()
    copied = {
        word.partition("/")[0]
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert {"dispatcher", "providers", "setup.py"} < copied
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied <= kept
    (clone,) = re.findall(
        r"cp -a \.dockerignore (.*?)\$work/clone", (ROOT / "tests/machine/build-images").read_text(), re.DOTALL
    )
    assert copied <= {*clone.split()}


BENCHES = [
    path
    for path in sorted((ROOT / "bench").iterdir())
    if path.is_file() and path.suffix != ".md" and path.name != "run"
]


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.name)
def test_benchmarks_import_what_there_is(path):
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in {"dispatcher", "tests"}:
            module = importlib.import_module(node.module)
            for each in node.names:
                if not hasattr(module, each.name) and not importlib.util.find_spec(f"{node.module}.{each.name}"):
                    missing.append(f"{node.module}.{each.name}")
    assert missing == []


def test_a_pin_is_for_the_versions_of_python_that_its_package_takes():
    """Debian 12 has Python 3.11.2: with a pin that wants 3.11.5, pip looks for other versions for hours."""
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    refused, checked = [], 0
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        try:
            found = distribution(pin.name)
        except PackageNotFoundError:
            continue
        if not pin.specifier.contains(found.version):
            continue  # of another version of Python
        checked += 1
        takes = SpecifierSet(found.metadata.get("Requires-Python") or "")
        for version in ("3.10.0", "3.11.0", "3.12.0", "3.13.0", "3.14.0"):
            python = {"python_full_version": version, "python_version": version.rpartition(".")[0]}
            if (pin.marker is None or pin.marker.evaluate(python)) and version not in takes:
                refused.append(f"{line}: not for Python {version}")
    assert refused == []
    assert checked > 20
