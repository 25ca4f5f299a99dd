"""Installs a plugin into a fresh environment and runs its tests there.

The environment is a venv of this interpreter.  After its own packages it sees all that this program sees: the core
is the installed one, and no package index is asked where the plugin's requirements and what builds it are at hand.
A copy of the plugin's directory is installed: nothing is written into it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dispatcher
from dispatcher.config.plugins import GROUP
from dispatcher.plugin.errors import BadRequest, ProviderError, Unavailable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

INSTALL_SECONDS = 600.0
TEST_SECONDS = 3600.0
TEST_EXTRAS = ("test", "tests", "testing", "dev")
CONTRACTS = {
    "provider": "ProviderContract",
    "authenticator": "AuthenticatorContract or WebAuthenticatorContract",
    "observer": "ObserverContract",
}
_LEFT_OUT = (
    "__pycache__",
    "*.egg-info",
    "build",
    "dist",
    ".venv",
    "venv",
    ".tox",
    ".nox",
    "node_modules",
    ".*_cache",
)


@dataclass(frozen=True)
class Project:
    """A plugin's project, as its pyproject.toml describes it.

    :ivar extras: that hold what its tests need; :ivar needs: what they need of a dependency group.
    :ivar build: what builds it.
    """

    directory: Path
    distribution: str
    plugins: tuple[str, ...]
    extras: tuple[str, ...]
    needs: tuple[str, ...]
    build: tuple[str, ...]


@dataclass
class Report:
    """What a check found.

    :ivar plugins: name, kinds and error of each; :ivar tests: test, contract, outcome and message of each.
    :ivar problems: what is wrong beside failed tests; :ivar only: the words that chose a part of the tests, or "".
    """

    distribution: str
    only: str = ""
    plugins: list[dict[str, Any]] = field(default_factory=list)
    tests: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything passed."""
        return not self.problems and all(test["outcome"] != "failed" for test in self.tests)

    def to_json(self) -> dict[str, Any]:
        """Return the form for `--json`."""
        return {"ok": self.ok, **asdict(self)}


def read(directory: Path) -> Project:
    """Read the project in a directory.

    :raises BadRequest: it is none, or declares no plugin.
    """
    path = directory / "pyproject.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(
            f"{directory} is not the project of a plugin",
            why=f"{path}: {error.strerror}",
            fix="see `dispatcher plugin new`",
        ) from error
    except ValueError as error:
        raise BadRequest(f"{path} is wrong", why=str(error)) from error
    project = _table(tables, "project")
    plugins = _table(_table(project, "entry-points"), GROUP)
    if not plugins or not isinstance(project.get("name"), str):
        raise BadRequest(
            f"{path} declares no plugin",
            why=f'it has no table [project.entry-points."{GROUP}"]' if not plugins else "it has no project.name",
            fix=f'write NAME = "MODULE" into [project.entry-points."{GROUP}"]; see docs/reference/hooks.md',
        )
    optional, groups = _table(project, "optional-dependencies"), _table(tables, "dependency-groups")
    extras = tuple(extra for extra in TEST_EXTRAS if extra in optional)[:1]
    group = next((name for name in TEST_EXTRAS if name in groups and not extras), "")
    return Project(
        directory=directory,
        distribution=project["name"],
        plugins=tuple(plugins),
        extras=extras,
        needs=tuple(_group(groups, group, ())),
        build=tuple(_table(tables, "build-system").get("requires", ["setuptools>=70.1"])),
    )


def _group(groups: dict[str, Any], name: str, within: tuple[str, ...]) -> list[str]:
    """Return the requirements of a dependency group (PEP 735), with those that it includes."""
    found: list[str] = []
    for each in groups.get(name, ()):
        other = each.get("include-group") if isinstance(each, dict) else None
        if isinstance(each, str):
            found.append(each)
        elif isinstance(other, str) and other not in {name, *within}:
            found += _group(groups, other, (name, *within))
    return found


def _table(table: dict[str, Any], key: str) -> dict[str, Any]:
    found = table.get(key, {})
    return found if isinstance(found, dict) else {}


def check(project: Project, note: Callable[[str], None], *, only: str = "") -> Report:
    """Install a project, load its plugins, run its tests.

    :param note: gets a line before each step; :param only: words that choose a part of the tests, as pytest's -k.
    :raises ProviderError: it cannot be installed; :raises Unavailable: pip is missing, or a step takes too long.
    """
    with _environment() as environment:
        note(f"installing {project.distribution} into a fresh environment that sees this program's packages")
        environment.install(project)
        report = Report(project.distribution, only)
        report.plugins = environment.loaded(project.plugins)
        report.problems = [plugin["error"] for plugin in report.plugins if plugin["error"]]
        note("running its tests")
        report.tests, failure = environment.tested(only)
    if failure:
        report.problems.append(failure)
    kinds = {kind for plugin in report.plugins for kind in plugin["kinds"]}
    for kind in sorted(kinds):
        checks = [test for test in report.tests if test["contract"] == kind]
        if not only and not any(test["outcome"] != "skipped" for test in checks):
            report.problems.append(_not_judged(kind, checks))
    return report


def _not_judged(kind: str, checks: list[dict[str, str]]) -> str:
    if checks:
        return f"All checks of the {CONTRACTS[kind]} were skipped: {checks[0]['message']}"
    return (
        f"No test class derives from {CONTRACTS[kind]}, so the kit has not tested the {kind} (write one, see "
        "docs/reference/conformance-kit.md)"
    )


@contextmanager
def _environment() -> Iterator[_Environment]:
    root = Path(tempfile.mkdtemp(prefix="plugin-check-"))
    try:
        root.chmod(0o755)  # agents of a provider have other user ids
        yield _Environment(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


class _Environment:
    """A venv that sees this program's packages after its own.

    :param root: an empty directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        home = root / "venv"
        venv.EnvBuilder(symlinks=True, with_pip=False).create(home)
        self._python = home / "bin/python"
        (site,) = home.glob("lib/python*/site-packages")
        lines = [f"import site; site.addsitedir({path!r})" for path in _visible()]
        (site / "dispatcher-core.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._source = root / "source"

    def install(self, project: Project) -> None:
        """Install a copy of a project, and pytest where it is not at hand."""
        if (
            importlib.util.find_spec("pip") is None
            and not self._run("-m", "ensurepip", seconds=INSTALL_SECONDS)[0]
        ):
            raise Unavailable(
                "The plugin cannot be installed", why="this Python has no pip", fix="install pip (python3-venv)"
            )
        try:
            left_out = shutil.ignore_patterns(*_LEFT_OUT)
            shutil.copytree(project.directory, self._source, symlinks=True, ignore=left_out)
        except OSError as error:
            raise BadRequest(f"{project.directory} cannot be copied", why=str(error)) from error
        what = f"{self._source}[{','.join(project.extras)}]" if project.extras else str(self._source)
        wanted = [
            what,
            *project.needs,
            *([] if importlib.util.find_spec("pytest") else ["pytest>=8", "pytest-timeout"]),
        ]
        done, first = self._pip("--no-build-isolation", "--check-build-dependencies", *wanted)
        if not done:  # what builds it is not at hand
            done, said = self._pip(*wanted)
        if not done:
            raise ProviderError(
                f"{project.distribution} cannot be installed",
                why=_end(said if "build dependencies" in first else first),
                fix=f"correct {project.directory / 'pyproject.toml'}; without a package index, install what it "
                f"names ({', '.join(project.build)}, ...) beside dispatcher",
            )

    def loaded(self, names: tuple[str, ...]) -> list[dict[str, Any]]:
        """Return what plugins are."""
        done, said = self._run("-m", "dispatcher.cli.plugin.inspect", *names, seconds=60, errors=False)
        try:
            found: list[dict[str, Any]] = json.loads(said.splitlines()[-1])
        except (IndexError, ValueError):
            why = f"it ended with {_end(said)!r}" if done else _end(said)
            found = [{"name": name, "kinds": [], "error": f"{name} cannot be loaded: {why}"} for name in names]
        return found

    def tested(self, only: str) -> tuple[list[dict[str, str]], str]:
        """Return the verdicts of the project's tests, and what else went wrong."""
        verdicts = self._root / "verdicts"
        done, said = self._run(
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "dispatcher.testing.pytest_verdicts"),
            *("--rootdir", str(self._source), "--verdicts", str(verdicts), *(["-k", only] if only else [])),
            seconds=TEST_SECONDS,
            cwd=self._source,
        )
        lines = verdicts.read_text(encoding="utf-8").splitlines() if verdicts.exists() else []
        found = [json.loads(line) for line in lines]
        if only and not found and " deselected in " in said:
            return [], f"No test matches {only!r}"
        ended = done or any(each["outcome"] == "failed" for each in found)
        return found, "" if ended else f"pytest failed: {_end(said)}"

    def _pip(self, *arguments: str) -> tuple[bool, str]:
        return self._run(
            "-m", "pip", "install", "--disable-pip-version-check", *arguments, seconds=INSTALL_SECONDS
        )

    def _run(
        self, *arguments: str, seconds: float, cwd: Path | None = None, errors: bool = True
    ) -> tuple[bool, str]:
        """Run the environment's Python; return whether it succeeded, and its output."""
        left_out = ("PYTEST_", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONDONTWRITEBYTECODE")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        try:
            done = subprocess.run(
                [str(self._python), *arguments],
                cwd=cwd or self._root,
                env=variables | {"PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if errors else None,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(
                "The check takes too long",
                why=f"{' '.join(arguments[:3])} has not ended after {seconds:g} seconds",
            ) from error
        return done.returncode == 0, done.stdout.decode(errors="replace")


def _visible() -> list[str]:
    """Return the directories from which this program imports packages, the standard library left out."""
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    standard |= {str(Path(path, "lib-dynload")) for path in standard}
    core = str(Path(dispatcher.__file__).parent.parent)
    found = [str(Path(path).resolve()) for path in (*sys.path[1:], core) if Path(path or ".").is_dir()]
    return [path for path in dict.fromkeys(found) if path not in standard]


def _end(said: str) -> str:
    """Return the last lines of what a program wrote, those with an error first."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return (
        " / ".join([line for line in lines if line.lower().startswith("error")][-3:] or lines[-3:]) or "no output"
    )
