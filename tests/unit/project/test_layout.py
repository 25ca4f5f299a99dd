"""Rules of the tree that import-linter (pyproject.toml) does not check."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

CORE = sorted(ROOT.glob("dispatcher/**/*.py"))
PLUGINS = sorted(
    path for place in ("providers", "authenticators") for path in ROOT.glob(f"{place}/dispatcher_*/**/*.py")
)
FORBIDDEN_NAMES = {"docker.py", "libvirt.py", "subprocess.py"}


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=relative)
def test_modules_say_what_they_are_for(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "the first lines say what the module is for"
    assert path.name not in FORBIDDEN_NAMES


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=relative)
def test_nothing_is_left_to_do(path):
    words = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
    found = [
        f"{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(word in line for word in words)
    ]
    assert found == []


def test_the_layers_are_kept():
    """The contracts of import-linter in pyproject.toml, as `make check` runs them."""
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_committed_file_names_this_machine():
    git = shutil.which("git")
    done = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True) if git else None
    if done is None or done.returncode:
        names = [
            str(path.relative_to(ROOT))
            for pattern in ("dispatcher/**/*", "providers/**/*", "authenticators/**/*", "docs/**/*", "*")
            for path in ROOT.glob(pattern)
        ]
    else:
        names = done.stdout.split("\0")
    here = (
        "/wo" + "rk/",
        "../sha" + "red",
        "/opt/py" + "pi",
        "deb.debian" + ".org",
        "pypi" + ".org",
        "files.python" + "hosted",
    )
    guilty = []
    for name in names:
        path = ROOT / name
        if (
            name
            and path.is_file()
            and path.suffix in {".py", ".md", ".toml", ".sh", ".txt", ".ini", ".service", ""}
        ):
            text = path.read_text(errors="replace")
            guilty += [f"{name}: {word}" for word in here if word in text]
    assert guilty == []


def test_every_plugin_is_registered_as_a_third_party_would(tmp_path):
    setup = (ROOT / "setup.py").read_text()
    places = [place for kind in ("providers", "authenticators") for place in ROOT.glob(f"{kind}/*/__init__.py")]
    folders = sorted(path.parent.name for path in places)
    assert folders == [f"dispatcher_{name}" for name in ("docker", "ldap", "libvirt", "oidc", "pam", "subprocess")]
    assert '"dispatcher.plugins"' in setup
    assert not any((ROOT / kind / "__init__.py").exists() for kind in ("providers", "authenticators"))
