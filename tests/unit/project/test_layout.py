"""The layout's rules: who may import whom, what a module may be called, how long it may be, what it says first."""

import ast
import subprocess

import pytest

from tests.conftest import ROOT

PUBLIC = {"plugin", "testing"}
CORE = sorted(ROOT.glob("dispatcher/**/*.py"))
PROVIDERS = sorted(ROOT.glob("providers/dispatcher_*/**/*.py"))
FORBIDDEN_NAMES = {"docker.py", "libvirt.py", "subprocess.py"}


def imports(path):
    """Yield the full name of each module that a file imports; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_the_core_never_imports_a_provider(path):
    assert [name for name in imports(path) if name.split(".")[0].startswith("dispatcher_")] == []


@pytest.mark.parametrize("path", PROVIDERS, ids=relative)
def test_providers_import_public_modules_only(path):
    package = path.relative_to(ROOT / "providers").parts[0]
    private = []
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "dispatcher" and rest and rest[0] not in PUBLIC:
            private.append(name)
        if top.startswith("dispatcher_") and top != package:
            private.append(name)
    assert private == []


@pytest.mark.parametrize("path", [*CORE, *PROVIDERS], ids=relative)
def test_modules_say_what_they_are_for_and_stay_readable(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the first lines say what it is for and what it may touch"
    assert len(path.read_text().splitlines()) <= 420
    assert path.name not in FORBIDDEN_NAMES


@pytest.mark.parametrize("path", [*CORE, *PROVIDERS], ids=relative)
def test_nothing_is_left_to_do(path):
    words = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
    found = [
        f"{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(word in line for word in words)
    ]
    assert found == []


@pytest.mark.parametrize(
    "package",
    [
        "dispatcher.plugin.provider",
        "dispatcher.plugin.model",
        "dispatcher.manager.agents.lifecycle",
        "dispatcher.plugin.names",
    ],
)
def test_what_calls_itself_pure_imports_no_io(package):
    io = {"socket", "subprocess", "asyncio", "threading", "http", "sqlalchemy", "flask", "docker", "libvirt"}
    path = ROOT / (package.replace(".", "/") + ".py")
    assert {name.split(".")[0] for name in imports(path)} & io == set()


def test_no_committed_file_names_this_machine():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        names = [
            str(path.relative_to(ROOT))
            for pattern in ("dispatcher/**/*", "providers/**/*", "docs/**/*", "*")
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
    folders = sorted(path.parent.name for path in ROOT.glob("providers/*/__init__.py"))
    assert folders == ["dispatcher_docker", "dispatcher_libvirt", "dispatcher_subprocess"]
    assert '"dispatcher.plugins"' in setup
    assert not (ROOT / "providers/__init__.py").exists()
