"""Tier *fault*: the backend is down, silent, or goes away in the middle.  `Unavailable` in time, nothing lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import ClassVar

import pytest

from dispatcher.plugin.errors import DispatcherError, ProviderError, Unavailable
from dispatcher.plugin.model import BackendState, Capability
from dispatcher.testing.base import Contract, needs_backend
from dispatcher.testing.driver import Driver, Steps, expect
from dispatcher.testing.kit import Agent, Kit, eventually


class FaultChecks(Contract, page="docs/howto/write-a-provider.md"):
    """What a provider does when its backend does not do its part."""

    #: Seconds that the calls to a silent backend get.
    silent_seconds: ClassVar[float] = 1.0

    def calls(self, driver: Driver, kit: Kit, agent: Agent, seconds: float) -> dict[str, Callable[[], object]]:
        """Return each method that needs the backend, as a call."""
        fresh = kit.spec("while-down")
        kit.fresh(driver.handle(fresh))
        calls: dict[str, Callable[[], object]] = {
            "check": lambda: driver.check(seconds=seconds),
            "observe": lambda: driver.observe(agent.handle, seconds=seconds),
            "list": lambda: driver.list(seconds=seconds),
            "ensure": lambda: driver.ensure(fresh, seconds=seconds),
            "stop": lambda: driver.stop(agent.handle, seconds=seconds),
            "destroy": lambda: driver.destroy(agent.handle, seconds=seconds),
        }
        if driver.can(Capability.SUSPEND):
            calls["suspend"] = lambda: driver.suspend(agent.handle, seconds=seconds)
        return calls

    @needs_backend
    def test_backend_down_is_unavailable(self, driver: Driver, kit: Kit, alice: Agent) -> None:
        """Every method raises `Unavailable` with a fix, quickly; afterwards the same instance works."""
        driver.check()
        calls = self.calls(driver, kit, alice, self.patience)
        with self.broken_backend("down"):
            for method, call in calls.items():
                began = time.monotonic()
                self._unavailable(method, call, "down")
                took = time.monotonic() - began
                expect(
                    took < 5,
                    f"{method}() took {took:.1f} s to see that the backend is down: a refusal is an answer",
                )
        driver.check()
        expect(
            eventually(lambda: driver.state(alice.handle) is not BackendState.STARTING, self.patience),
            "after the backend came back the agent's state is not reported",
        )
        kit.shared(driver, "alice")

    @needs_backend
    def test_silent_backend_meets_the_deadline(self, driver: Driver, kit: Kit, alice: Agent) -> None:
        """If the backend accepts requests and does not answer, every method keeps its deadline."""
        driver.check()
        calls = self.calls(driver, kit, alice, self.silent_seconds)
        with self.broken_backend("silent"):
            for method, call in calls.items():
                self._unavailable(method, call, "silent")
        expect(
            eventually(lambda: _answers(driver), self.patience, 0.2),
            "after a silent backend came back the instance does not work: make a new connection",
        )
        kit.shared(driver, "alice")

    @needs_backend
    def test_one_hung_call_holds_up_no_other_instance(self, driver: Driver, kit: Kit) -> None:
        """Calls to a silent backend from many threads all end in time."""
        handles = [driver.handle(kit.spec(f"hung{number}")) for number in range(8)]
        driver.check()

        def observe(number: int) -> None:
            with pytest.raises(Unavailable):
                driver.observe(handles[number], seconds=self.silent_seconds)

        began = time.monotonic()
        with self.broken_backend("silent"):
            kit.together([lambda number=number: observe(number) for number in range(8)])  # type: ignore[misc]
            took = time.monotonic() - began
        expect(
            took < self.silent_seconds + self.slack + 3,
            f"eight calls to a silent backend took {took:.1f} s: they wait for each other",
        )

    @needs_backend
    def test_backend_that_goes_away_in_the_middle(self, driver: Driver, kit: Kit) -> None:
        """If the backend fails during `ensure`: `Unavailable`; a later `ensure` creates one complete agent."""
        kit.share(driver, ["alice", "bob"])
        spec = kit.spec("middle")
        handle = driver.handle(spec)
        kit.fresh(handle)
        with self.leaves_nothing(kit, "an interrupted start", 3):
            with contextlib.ExitStack() as stack:
                steps = Steps(1, lambda: stack.enter_context(self.broken_backend("down")))
                try:
                    driver.ensure(spec, progress=steps)
                except (Unavailable, ProviderError):
                    pass
                except DispatcherError as error:
                    pytest.fail(
                        f"ensure() raised {type(error).__name__} when the backend went away: raise Unavailable"
                    )
            expect(steps.reported, "ensure() never called progress")
            expect(
                eventually(lambda: _answers(driver), self.patience, 0.2),
                "the provider does not work after the backend came back",
            )
            agent = kit.start(driver, spec)
            expect(
                list(driver.list()).count("middle") == 1,
                "an interrupted ensure() and the next one made two agents",
            )
            driver.destroy(agent.handle)

    @needs_backend
    def test_watch_survives_the_backend(self, driver: Driver, kit: Kit) -> None:
        """EVENTS: after an outage of the backend `watch` reports a gap ("") and continues."""
        if not driver.can(Capability.EVENTS):
            return
        reported: list[str] = []
        watch = driver.watch(reported.append)
        try:
            time.sleep(0.3)
            with self.broken_backend("down"):
                time.sleep(0.5)
            expect(
                eventually(lambda: "" in reported, self.patience, 0.1),
                'after the backend came back watch() did not report a gap: call on_change("")',
            )
            agent = kit.start(driver, kit.spec("watched"))
            reported.clear()
            agent.inside.post("/exit", code=3)
            expect(
                eventually(lambda: agent.handle.name in reported, self.patience, 0.1),
                "after the backend came back watch() reports nothing: connect again",
            )
        finally:
            watch.close()

    def _unavailable(self, method: str, call: Callable[[], object], how: str) -> None:
        try:
            found = call()
        except Unavailable as error:
            expect(
                error.why or error.fix,
                f"{method}() raised {str(error)!r} with the backend {how}: say why and what to do",
            )
            return
        except DispatcherError as error:
            pytest.fail(f"{method}() raised {type(error).__name__} with the backend {how}: raise Unavailable")
        pytest.fail(
            f"{method}() gave {found!r} with the backend {how}: raise Unavailable; what was last known stays, "
            "it never becomes stopped or absent"
        )


def _answers(driver: Driver) -> bool:
    try:
        driver.check(seconds=2)
    except Unavailable:
        return False
    return True
