"""The conformance kit: subclass `ProviderContract`, give it a provider, run pytest.

    class TestMine(ProviderContract):
        @pytest.fixture
        def provider(self, context):
            return MyProvider(context=context, options=MyProvider.Options())

`docs/reference/conformance-kit.md` describes all checks and settings.  Needs pytest.
"""

from __future__ import annotations

from pathlib import Path

from dispatcher.testing.authenticator import AuthenticatorContract
from dispatcher.testing.base import Contract
from dispatcher.testing.checks.adoption import AdoptionChecks
from dispatcher.testing.checks.capability import CapabilityChecks
from dispatcher.testing.checks.concurrency import ConcurrencyChecks
from dispatcher.testing.checks.core import CoreChecks
from dispatcher.testing.checks.fault import FaultChecks
from dispatcher.testing.checks.isolation import IsolationChecks
from dispatcher.testing.checks.leaks import LeakChecks
from dispatcher.testing.checks.lifecycle import LifecycleChecks
from dispatcher.testing.checks.plugin import PluginChecks
from dispatcher.testing.checks.process import ProcessChecks
from dispatcher.testing.checks.promises import PromiseChecks
from dispatcher.testing.checks.secrecy import SecrecyChecks
from dispatcher.testing.driver import Driver, expect
from dispatcher.testing.kit import Agent, Kit
from dispatcher.testing.observer import ObserverContract
from dispatcher.testing.probe_client import Inside, Refused
from dispatcher.testing.web_authenticator import WebAuthenticatorContract

#: The app that every agent of the kit runs: Python, standard library only.
PROBE = Path(__file__).with_name("probe.py")
#: The same for places without Python: busybox only.
PROBE_SH = Path(__file__).with_name("probe.sh")


class ProviderContract(
    FaultChecks,
    SecrecyChecks,
    LeakChecks,
    IsolationChecks,
    ConcurrencyChecks,
    AdoptionChecks,
    PromiseChecks,
    CapabilityChecks,
    LifecycleChecks,
    ProcessChecks,
    CoreChecks,
    PluginChecks,
):
    """Everything that a provider must do.  See `Contract` for what to fill in.

    The checks of the last base run first.
    """


__all__ = [
    "PROBE",
    "PROBE_SH",
    "Agent",
    "AuthenticatorContract",
    "Contract",
    "Driver",
    "Inside",
    "Kit",
    "ObserverContract",
    "ProviderContract",
    "Refused",
    "WebAuthenticatorContract",
    "expect",
]
