"""A plugin of pytest for `dispatcher plugin check`: writes each test's verdict as a line of JSON.

pytest -p dispatcher.testing.pytest_verdicts --verdicts FILE
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dispatcher.testing import (
    AuthenticatorContract,
    ObserverContract,
    ProviderContract,
    WebAuthenticatorContract,
)

CONTRACTS: dict[str, tuple[type, ...]] = {
    "provider": (ProviderContract,),
    "authenticator": (AuthenticatorContract, WebAuthenticatorContract),
    "observer": (ObserverContract,),
}
_CONTRACT = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the file."""
    parser.addoption("--verdicts", type=Path, help="write verdicts as lines of JSON into this file")


def pytest_configure(config: pytest.Config) -> None:
    """Write verdicts if the option is given."""
    if path := config.getoption("--verdicts"):
        config.pluginmanager.register(_Verdicts(path))


class _Verdicts:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._contracts: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            cls = getattr(item, "cls", None)
            found = [kind for kind, contract in CONTRACTS.items() if cls and issubclass(cls, contract)]
            # A check that the class overrides is the author's own.
            own = bool(cls) and getattr(item, "originalname", "") in vars(cls)
            self._contracts[item.nodeid] = "" if own else "".join(found)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, _message(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._write(report.nodeid, report.outcome, _message(report))

    def _write(self, test: str, outcome: str, message: str) -> None:
        line = {"test": test, "contract": self._contracts.get(test, ""), "outcome": outcome, "message": message}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test did not pass, without its traceback where the kit gave advice."""
    if report.outcome == "passed" or report.longrepr is None:
        return ""
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).removeprefix("Failed: ")
