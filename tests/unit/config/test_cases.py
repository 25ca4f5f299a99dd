"""The page of cases names tests that exist, and each test that was written for it is named there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/explanation/cases.md").read_text()
ROWS = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "::" in line]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py::[\w:]+)`", PAGE)))


def functions_of(path):
    """Return the tests of a file, those of a class as CLASS::TEST."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        for each in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(each, ast.FunctionDef) and each.name.startswith("test_"):
                found.add(f"{node.name}::{each.name}" if isinstance(node, ast.ClassDef) else each.name)
    return found


@pytest.mark.parametrize("path", sorted({name.partition("::")[0] for name in NAMED}))
def test_what_is_named_exists(path):
    file = ROOT / ("dispatcher" if path.startswith("testing/") else "tests") / path
    named = {name.partition("::")[2] for name in NAMED if name.startswith(path + "::")}
    assert named - functions_of(file) == set()


def test_each_case_has_its_tests():
    assert len(ROWS) > 55
    for what, must, tests in ROWS:
        assert len(what) > 10
        assert len(must) > 3
        assert tests.count("`") >= 2


def test_what_was_written_for_a_case_is_named():
    for path in sorted((ROOT / "tests").glob("*/test_cases_*.py")):
        name = str(path.relative_to(ROOT / "tests"))
        assert {f"{name}::{test}" for test in functions_of(path)} - set(NAMED) == set()
