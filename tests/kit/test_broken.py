"""The kit catches each provider of tests/kit/broken by the check that is meant for it, with words that help.

Their checks run in one pytest of its own; what it reports is judged here.
"""

import importlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BROKEN = sorted(path.stem for path in (HERE / "broken").glob("[a-z]*.py"))

pytestmark = pytest.mark.xdist_group("kit")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Message of the failed check by broken provider; "" where the check passed.

    The checks are impatient, so that waiting for what never happens takes little.  Where load was the first thing
    that a check saw, it runs again with the usual patience.
    """
    directory = tmp_path_factory.mktemp("kit")
    found = run(BROKEN, directory / "report.xml", patience=1.5)
    unclear = [name for name in BROKEN if not re.search(fault(name).ADVICE, found[name])]
    return found | (run(unclear, directory / "again.xml", patience=15.0) if unclear else {})


def fault(name):
    return importlib.import_module(f"tests.kit.broken.{name}")


def run(names, report, patience):
    chosen = [f"{HERE / 'broken' / name}.py::TestBroken::{fault(name).CHECK}" for name in names]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *chosen],
        cwd=HERE.parent.parent,
        env={**environment, "KIT_PATIENCE": str(patience)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode in {0, 1}, done.stdout[-3000:] + done.stderr[-1000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname").split(".")[-2]
        problem = next(iter(case.findall("failure") + case.findall("error")), None)
        found[name] = "" if problem is None else problem.get("message") + (problem.text or "")
    return found


def test_there_are_enough():
    assert len(BROKEN) >= 60


@pytest.mark.parametrize("name", BROKEN)
def test_caught_by_the_check_meant_for_it(verdicts, name):
    module = fault(name)
    if os.geteuid() and (reason := getattr(module, "ROOT", "")):
        pytest.skip(reason)
    assert verdicts[name], f"{module.CHECK} passes a provider with this fault: {module.__doc__}"
    assert re.search(module.ADVICE, verdicts[name]), verdicts[name][:1500]
    assert re.search(r"^Read (docs/|.*/provider\.py:\d+ )", verdicts[name], re.MULTILINE), verdicts[name][:1500]
