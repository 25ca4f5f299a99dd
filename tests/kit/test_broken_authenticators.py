"""The contract of authenticators: the reference passes; of each broken one exactly the check meant for it fails.

All run in one pytest of its own; what it reports is judged here.
"""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.kit.broken_authenticators import CASES

HERE = Path(__file__).parent

pytestmark = pytest.mark.xdist_group("kit")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """What failed, by class and check."""
    report = tmp_path_factory.mktemp("kit") / "report.xml"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
         HERE / "broken_authenticators.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode in {0, 1}, done.stdout[-3000:] + done.stderr[-1000:]
    found = defaultdict(dict)
    for each in ElementTree.parse(report).iter("testcase"):
        problem = next(iter(each.findall("failure") + each.findall("error")), None)
        assert each.find("skipped") is None
        if problem is not None:
            text = problem.get("message") + (problem.text or "")
            found[each.get("classname").split(".")[-1]][each.get("name")] = text
    return found


def test_there_are_enough():
    assert len(CASES) >= 12


@pytest.mark.parametrize("name", CASES)
def test_caught_by_the_check_meant_for_it_alone(verdicts, name):
    check, advice = CASES[name]
    assert list(verdicts[name]) == [check], verdicts[name]
    assert re.search(advice, verdicts[name][check]), verdicts[name][check][:1500]


def test_a_constructor_that_hangs_in_the_author_s_fixture_is_a_verdict(verdicts):
    found = verdicts["TestHangsWhenMade"]
    assert len(found) > 40
    words = "the fixture `authenticator` has not returned after 0.7 s"
    assert [check for check, text in found.items() if words not in text] == []
    assert [
        check for check, text in found.items() if "Read docs/howto/write-an-authenticator.md" not in text
    ] == []
