"""All tiers in one class: what a provider's author subclasses."""

from __future__ import annotations

from dispatcher.testing.checks.adoption import AdoptionChecks
from dispatcher.testing.checks.capability import CapabilityChecks
from dispatcher.testing.checks.concurrency import ConcurrencyChecks
from dispatcher.testing.checks.core import CoreChecks
from dispatcher.testing.checks.fault import FaultChecks
from dispatcher.testing.checks.isolation import IsolationChecks
from dispatcher.testing.checks.leaks import LeakChecks
from dispatcher.testing.checks.lifecycle import LifecycleChecks
from dispatcher.testing.checks.promises import PromiseChecks
from dispatcher.testing.checks.secrecy import SecrecyChecks


class ProviderContract(
    CoreChecks,
    LifecycleChecks,
    CapabilityChecks,
    PromiseChecks,
    AdoptionChecks,
    ConcurrencyChecks,
    IsolationChecks,
    LeakChecks,
    SecrecyChecks,
    FaultChecks,
):
    """Everything that a provider must do.  See `Contract` for what to fill in."""
