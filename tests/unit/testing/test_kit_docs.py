"""The reference page of the conformance kit describes every check, in the words of the code, and no other."""

import inspect
import re
import subprocess
import sys

import pytest

from dispatcher.testing import Contract, ProviderContract, verdict
from tests.conftest import ROOT

PAGE = (ROOT / "docs/reference/conformance-kit.md").read_text()
DESCRIBED = re.findall(
    r"^\| `(\w+)` \| ", PAGE.partition("## The checks")[2].partition("\n## Authenticators")[0], re.MULTILINE
)
PROVIDER = (ROOT / "dispatcher/plugin/provider.py").read_text()
COLLECTED = "tests/contract/test_fake_provider.py::TestFake"
TIERS = [cls for cls in ProviderContract.__mro__ if cls.__module__.startswith("dispatcher.testing.checks.")]
CHECKS = {
    name: inspect.getdoc(function)
    for cls in TIERS
    for name, function in vars(cls).items()
    if name.startswith("test_")
}


def row(name):
    return f"| `{name.removeprefix('test_')}` | {' '.join(CHECKS[name].split())} |"


def test_there_are_enough_checks():
    assert len(CHECKS) >= 60


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_is_described(name):
    assert row(name) in PAGE, f"put this into docs/reference/conformance-kit.md:\n{row(name)}"


def test_the_page_describes_no_check_that_there_is_not():
    assert sorted(DESCRIBED) == sorted(name.removeprefix("test_") for name in CHECKS)


def test_checks_run_in_the_order_of_the_page():
    """Entry point, hook and class first; the faults of a backend last."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", COLLECTED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    collected = list(dict.fromkeys(re.findall(r"::test_(\w+)", done.stdout)))
    assert collected == DESCRIBED


@pytest.mark.parametrize("name", CHECKS)
def test_the_verdict_of_each_check_says_what_to_read(monkeypatch, name):
    monkeypatch.setenv("PYTEST_CURRENT_TEST", f"tests/test_mine.py::TestMine::{name}[x-1] (call)")
    check, *places = verdict.places()
    assert check.startswith(f"The check `{name.removeprefix('test_')}`")
    for place in places:
        file, _, line = place.removeprefix("Read ").partition(" ")[0].partition(":")
        path = ROOT / file
        assert path.is_file(), place
        assert not line or int(line) <= len(path.read_text().splitlines()), place
    rule = getattr(getattr(ProviderContract, name), "rule", "")
    assert not rule or any(
        rule in PROVIDER.splitlines()[int(place.split(":")[1].split()[0]) - 1] for place in places[:-1]
    )


def test_a_verdict_names_the_line_of_the_method(monkeypatch):
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "test_mine.py::TestMine::test_ensure_twice_is_one_agent (call)")
    (place,) = [place for place in verdict.places() if place.endswith(" Provider.ensure")]
    number = int(place.split(":")[1].split()[0])
    assert PROVIDER.splitlines()[number:][0].strip().startswith("def ensure(")  # after its decorator


def settings():
    """What an author may set or override: public, and no fixture of the checks' own."""
    own = {name for name in vars(Contract) if not name.startswith("_")}
    return sorted(
        own - {"alice", "bob", "drive", "driver", "kit", "context", "drive_another", "leaves_nothing", "other"}
    )


@pytest.mark.parametrize("name", settings())
def test_each_setting_is_described(name):
    assert re.search(rf"^\| `{name}`", PAGE, re.MULTILINE), name
