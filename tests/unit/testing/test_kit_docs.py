"""The reference page of the conformance kit describes every check, in the words of the code, and no other."""

import inspect
import re

import pytest

from dispatcher.testing import Contract, ProviderContract
from tests.conftest import ROOT

PAGE = (ROOT / "docs/reference/conformance-kit.md").read_text()
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
    described = re.findall(
        r"^\| `(\w+)` \| ", PAGE.partition("## The checks")[2].partition("\n## Authenticators")[0], re.MULTILINE
    )
    assert sorted(described) == sorted(name.removeprefix("test_") for name in CHECKS)


def settings():
    """What an author may set or override: public, and no fixture of the checks' own."""
    own = {name for name in vars(Contract) if not name.startswith("_")}
    return sorted(own - {"alice", "bob", "drive", "driver", "kit", "context", "leaves_nothing", "other"})


@pytest.mark.parametrize("name", settings())
def test_each_setting_is_described(name):
    assert re.search(rf"^\| `{name}`", PAGE, re.MULTILINE), name
