"""The conformance kit: subclass `ProviderContract`, give it a provider, run pytest.

    class TestMine(ProviderContract):
        @pytest.fixture
        def provider(self, context):
            return MyProvider(context=context, options=MyProvider.Options())

`docs/reference/conformance-kit.md` describes all checks and settings.  Needs pytest.
"""

from __future__ import annotations

from pathlib import Path

from dispatcher.testing.base import Contract
from dispatcher.testing.contract import ProviderContract
from dispatcher.testing.driver import Driver, expect
from dispatcher.testing.inside import Inside, Refused
from dispatcher.testing.kit import Agent, Kit

#: The app that every agent of the kit runs: Python, standard library only.
PROBE = Path(__file__).with_name("probe.py")
#: The same for places without Python: busybox only.
PROBE_SH = Path(__file__).with_name("probe.sh")

__all__ = [
    "PROBE",
    "PROBE_SH",
    "Agent",
    "Contract",
    "Driver",
    "Inside",
    "Kit",
    "ProviderContract",
    "Refused",
    "expect",
]
