"""`plugin new` and `plugin check`, as far as they start no other program."""

import json
import re
import subprocess
import sys

import pytest

from dispatcher.cli.plugin import check, new
from tests.conftest import ROOT

KINDS = ("provider", "authenticator", "observer")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_new_writes_a_distribution_and_says_what_is_next(run, here, kind):
    code, out, err = run("plugin", "new", "my-own_one", f"--{kind}")
    assert (code, err) == (0, "")
    files = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    assert files == {
        f"dispatcher-my-own-one/{name}"
        for name in (
            "pyproject.toml",
            "dispatcher_my_own_one.py",
            "test_my_own_one.py",
            "README.md",
            ".gitignore",
            ".github/workflows/test.yml",
        )  # fmt: skip
    }
    for path in here.rglob("*.*"):
        if path.is_file():
            assert not re.search(r"@[A-Z]+@", path.read_text()), path
    assert "dispatcher plugin check dispatcher-my-own-one" in out
    assert "pip install -e dispatcher-my-own-one" in out
    assert {"provider": 'provider = "my-own_one"', "authenticator": 'authenticator = "my-own_one"',
            "observer": 'plugins = ["my-own_one"]'}[kind] in out  # fmt: skip
    made = here / "dispatcher-my-own-one"
    style = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=E,F,UP,B", "--ignore=E501", made]
    assert subprocess.run([*style, "--no-cache"], capture_output=True, text=True).stdout == "All checks passed!\n"
    assert ("sudo" in (made / ".github/workflows/test.yml").read_text()) == (kind == "provider")
    project = check.read(made)
    assert (project.distribution, project.plugins) == ("dispatcher-my-own-one", ("my-own_one",))


def test_what_tests_need_is_found_in_an_extra_or_a_dependency_group(here):
    made = new.new("staff", "authenticator")
    pyproject = made / "pyproject.toml"
    groups = """
[dependency-groups]
dev = [{include-group = "test"}, "ruff"]
test = ["ldap3>=2", {include-group = "dev"}, {include-group = "absent"}]
"""
    pyproject.write_text(pyproject.read_text() + groups)
    assert (check.read(made).extras, check.read(made).needs) == (("test",), ())
    pyproject.write_text(
        pyproject.read_text().replace("[project.optional-dependencies]\ntest =", "[tool.none]\na =")
    )
    assert (check.read(made).extras, check.read(made).needs) == ((), ("ldap3>=2", "ruff"))


@pytest.mark.parametrize(
    ("page", "name", "kind"),
    [("write-a-provider.md", "bare", "provider"), ("write-an-authenticator.md", "staff", "authenticator")],
)
def test_the_page_shows_what_is_made(here, page, name, kind):
    text = (ROOT / "docs/howto" / page).read_text()
    shown = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', text, re.DOTALL | re.MULTILINE))
    assert sorted(shown) == sorted(["pyproject.toml", f"dispatcher_{name}.py", f"test_{name}.py"])
    made = new.new(name, kind)
    for file, text in shown.items():
        assert text == (made / file).read_text(), f"{page} and {new.TEMPLATES / kind} differ in {file}: edit both"


def test_new_as_json_into_a_directory(run, here):
    code, out, _ = run("--json", "plugin", "new", "x", "deep/er", "--observer")
    found = json.loads(out)
    assert code == 0
    assert found["directory"] == "deep/er"
    assert (here / "deep/er" / found["files"][-1]).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["x"], 2, "Name the kind of plugin: --provider, --authenticator or --observer"),
        (["Ab", "--provider"], 2, "Bad name of a plugin 'Ab': use 1 to 32 of a-z, 0-9, _ and - (choose another)"),
        (["../x", "--provider"], 2, "Bad name of a plugin '../x'"),
        (["x" * 33, "--provider"], 2, "use 1 to 32"),
        (["subprocess", "--provider"], 4, "There is a plugin 'subprocess': it is of agent-dispatcher"),
        (["docker", "--observer"], 4, "There is a plugin 'docker'"),
        (["local", "--authenticator"], 4, "There is a plugin 'local': it is of agent-dispatcher"),
        (["environment", "--provider"], 4, "it is a key of [apps.NAME] (choose another name)"),
        (["session_idle", "--authenticator"], 4, "it is a key of [auth]"),
        (["x", "there", "--observer"], 4, "there exists (remove it, or name another directory)"),
        (["x", "file/x", "--observer"], 2, "file/x cannot be made: Not a directory"),
    ],
)
def test_what_new_refuses(run, here, arguments, code, complaint):
    (here / "there").mkdir()
    (here / "file").touch()
    got, out, err = run("plugin", "new", *arguments)
    assert (got, out) == (code, "")
    assert complaint in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in here.iterdir()) == ["file", "there"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            None,
            "is not the project of a plugin: pyproject.toml: No such file or directory (see `dispatcher plugin new`)",
        ),
        ("[", "pyproject.toml is wrong"),
        ("[project]\nname = 'x'", 'it has no table [project.entry-points."dispatcher.plugins"]'),
        ("[project.entry-points.\"dispatcher.plugins\"]\nx = 'x'", "it has no project.name"),
    ],
)
def test_what_check_refuses(run, here, text, complaint):
    if text is not None:
        (here / "pyproject.toml").write_text(text)
    code, out, err = run("plugin", "check", ".")
    assert (code, out) == (2, "")
    assert complaint in err


def test_both_spellings_of_the_group_work(run):
    for words in ([], ["new"], ["list"]):
        (code, one, _), (_, other, _) = run("plugins", *words, "--help"), run("plugin", *words, "--help")
        assert code == 0
        assert one.replace("Usage: dispatcher plugins", "Usage: dispatcher plugin") == other


def test_the_environment_sees_every_directory_of_this_program():
    visible = check._visible()
    assert str(new.TEMPLATES.parents[3]) in visible
    assert not [path for path in visible if path.endswith(f"python3.{sys.version_info[1]}")]


def test_a_part_of_the_checks_that_is_empty_is_no_success(tmp_path, monkeypatch):
    def deselected(*arguments, **_):
        assert arguments[-2:] == ("-k", "nothing")
        return False, "108 deselected in 0.31s"

    environment = check._Environment(tmp_path)
    monkeypatch.setattr(environment, "_run", deselected)
    assert environment.tested("nothing") == ([], "No test matches 'nothing'")
