"""The reference page describes every check and setting of the authenticators' contract, in the words of the code."""

import inspect
import re

import pytest

from dispatcher.testing import AuthenticatorContract
from dispatcher.testing.authenticator.base import AuthenticatorBase
from tests.conftest import ROOT

SECTION = (ROOT / "docs/reference/conformance-kit.md").read_text().partition("\n## Authenticators\n")[2]
CHECKS = {
    name: inspect.getdoc(function)
    for cls in AuthenticatorContract.__mro__
    for name, function in vars(cls).items()
    if name.startswith("test_")
}
SETTINGS = sorted(
    {name for name in vars(AuthenticatorBase) if not name.startswith("_")} - {"alice", "ask", "asker", "bob"}
)


def test_there_are_enough_checks():
    assert len(CHECKS) >= 30


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_is_described(name):
    row = f"| `{name.removeprefix('test_')}` | {' '.join(CHECKS[name].split())} |"
    assert row in SECTION, f"put this into docs/reference/conformance-kit.md:\n{row}"


def test_nothing_else_is_described():
    described = re.findall(
        r"^\| `(\w+)` \| ", SECTION.partition("### Authenticators: declaration")[2], re.MULTILINE
    )
    assert sorted(described) == sorted(name.removeprefix("test_") for name in CHECKS)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_is_described(name):
    assert re.search(rf"^\| `{name}`", SECTION, re.MULTILINE), name
