"""The reference page describes every check and setting of the contracts of authenticators and observers."""

import inspect
import re
from pathlib import Path

import pytest

from dispatcher.plugin import AgentEvent
from dispatcher.testing import AuthenticatorContract, ObserverContract, WebAuthenticatorContract
from dispatcher.testing.authenticator.base import AuthenticatorBase, places
from dispatcher.testing.observer import KINDS
from tests.conftest import ROOT

PAGE = (ROOT / "docs/reference/conformance-kit.md").read_text()
SECTIONS = {
    AuthenticatorContract: PAGE.partition("\n## Authenticators\n")[2].partition(
        "\n## Authenticators with a site\n"
    )[0],
    WebAuthenticatorContract: PAGE.partition("\n## Authenticators with a site\n")[2].partition("\n## Observers\n")[
        0
    ],
    ObserverContract: PAGE.partition("\n## Observers\n")[2],
}
CHECKS = [
    (contract, name, inspect.getdoc(function))
    for contract in SECTIONS
    for cls in contract.__mro__
    for name, function in vars(cls).items()
    if name.startswith("test_")
]
SETTINGS = sorted(
    {name for name in vars(AuthenticatorBase) if not name.startswith("_")} - {"alice", "ask", "asker", "bob"}
)


def test_there_are_enough_checks():
    assert sum(contract is AuthenticatorContract for contract, _, _ in CHECKS) >= 30


@pytest.mark.parametrize(("contract", "name", "words"), CHECKS, ids=[name for _, name, _ in CHECKS])
def test_each_check_is_described(contract, name, words):
    row = f"| `{name.removeprefix('test_')}` | {' '.join(words.split())} |"
    assert row in SECTIONS[contract], f"put this into docs/reference/conformance-kit.md:\n{row}"


@pytest.mark.parametrize(
    ("contract", "heading"),
    [*zip(SECTIONS, ("Authenticators: declaration", "Authenticators with a site: checks", "Observers: checks"))],
)
def test_nothing_else_is_described(contract, heading):
    rows = re.findall(r"^\| `(\w+)` \| ", SECTIONS[contract].partition(f"### {heading}")[2], re.MULTILINE)
    assert sorted(rows) == sorted(name.removeprefix("test_") for each, name, _ in CHECKS if each is contract)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_is_described(name):
    assert re.search(rf"^\| `{name}`", SECTIONS[AuthenticatorContract], re.MULTILINE), name


def test_the_contract_sends_every_kind_of_event():
    listed = re.search(r":ivar kind: (.*?)\.$", AgentEvent.__doc__, re.DOTALL | re.MULTILINE)[1]
    assert set(re.split(r",\s+", listed)) == set(KINDS)


@pytest.mark.parametrize("name", [name for contract, name, _ in CHECKS if contract is AuthenticatorContract])
def test_the_verdict_of_each_check_says_what_to_read(name):
    about, contract, guide = places(getattr(AuthenticatorContract, name))
    assert about.startswith(f"The check `{name.removeprefix('test_')}` (docs/reference/conformance-kit.md): ")
    file, line, method = re.fullmatch(r"Read (.*):(\d+) Authenticator\.(\w+)", contract).groups()
    assert f"def {method}(" in "".join(Path(file).read_text().splitlines()[int(line) - 1 : int(line) + 1])
    assert (ROOT / guide.removeprefix("Read ")).is_file()
