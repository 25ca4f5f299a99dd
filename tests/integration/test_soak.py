"""bench/soak for half a minute: honest and hostile clients together, nothing honest lost, memory and descriptors flat."""

import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader

import pytest

from tests.conftest import ROOT

SOAK = ROOT / "bench/soak"


def test_honest_clients_are_served_beside_hostile_ones_and_the_proxy_stays_small():
    done = subprocess.run(
        [sys.executable, SOAK, "--json", "--minutes", "0.5", "--honest", "8", "--hostile", "12"],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == [], done.stderr[-3000:]
    assert done.returncode == 0
    assert found["honest"] > 100
    assert len([kind for kind in found["done"] if kind.startswith("hostile")]) >= 10


GOOD = {
    "lost": [],
    "worker": {"early": 20 << 20, "most": 30 << 20, "end": 25 << 20},
    "portal": {"early": 20 << 20, "most": 30 << 20, "end": 25 << 20},
    "descriptors": {"idle": 18, "end": 20},
    "restarted": False,
    "honest": 1000,
    "hostile": 100,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"lost": ["honest: TimeoutError()"]}, "1 honest requests were lost"),
        ({"worker": {"early": 20 << 20, "most": 90 << 20, "end": 80 << 20}}, "worker's memory grew from 20 to 80"),
        ({"portal": {"early": 20 << 20, "most": 900 << 20, "end": 20 << 20}}, "the portal held 900 MiB"),
        ({"descriptors": {"idle": 18, "end": 60}}, "descriptors grew from 18 to 60"),
        ({"restarted": True}, "the worker ended"),
        ({"honest": 0}, "the clients did nothing"),
    ],
)
def test_the_judgement(change, words):
    loader = SourceFileLoader("soak", str(SOAK))
    soak = module_from_spec(spec_from_loader("soak", loader))
    loader.exec_module(soak)
    found = soak.faults(GOOD | change)
    assert found == [] if words is None else words in found[0]
