"""The life of running agents (tier *core*, no opt-out)."""

from __future__ import annotations

import time

import pytest

from dispatcher.plugin.errors import Cancelled, DeadlineExceeded, DispatcherError, SpecConflict
from dispatcher.plugin.model import BackendState, Capability
from dispatcher.testing.base import Contract, rule
from dispatcher.testing.driver import Driver, Steps, cancel, expect, raises
from dispatcher.testing.kit import Agent, Kit, eventually

ENDED = {BackendState.STOPPED, BackendState.ABSENT}
ODD_VALUE = "a b\t'c' \"d\" $HOME `e` \\n {x} {socket\u00e9} <&> #; -rf é漢"


class LifecycleChecks(Contract, page="docs/explanation/lifecycle.md"):
    """Start, state, stop, restart, end by itself, destroy."""

    def test_ensure_runs_and_answers(self, alice: Agent, driver: Driver) -> None:
        """After `ensure` the handle from `handle` finds the agent RUNNING: endpoint, start time, spec's hash."""
        foretold = driver.handle(alice.spec)
        expect(foretold.name == alice.handle.name, "handle() and ensure() give different names for one spec")
        seen = driver.observe(foretold)
        expect(seen.state is BackendState.RUNNING, f"a running agent is observed as {seen.state.value}")
        expect(seen.endpoint, "observe() of a running agent names no endpoint")
        expect(
            seen.spec_hash == alice.spec.hash,
            "Observation.spec_hash is not spec.hash: store it with the agent, it decides what is outdated",
        )
        expect(
            seen.started_at is not None and abs(time.time() - seen.started_at) < 3600,
            f"Observation.started_at is {seen.started_at!r}: give Unix time in seconds",
        )
        expect(not seen.exit_reason, f"a running agent has the exit reason {seen.exit_reason!r}: leave it empty")

    def test_ensure_twice_is_one_agent(self, alice: Agent, driver: Driver, kit: Kit) -> None:
        """`ensure` again leaves the running agent alone."""
        before = alice.inside.id()["start"]
        again = kit.reach(driver, alice.spec, driver.ensure(alice.spec))
        expect(
            again.inside.id()["start"] == before,
            "ensure() of a running agent restarted it: return its handle and touch nothing",
        )
        expect(list(driver.list()).count(alice.spec.agent) == 1, "ensure() twice made two agents")

    def test_other_spec_conflicts(self, alice: Agent, driver: Driver, kit: Kit) -> None:
        """`ensure` with another spec raises `SpecConflict` and leaves the running agent as it was."""
        before = alice.inside.id()["start"]
        other = kit.spec(alice.spec.agent, environment={"KIT_OTHER": "1"})
        with raises(SpecConflict, "ensure() of a running agent with another spec: compare spec.hash"):
            driver.ensure(other)
        again = kit.reach(driver, alice.spec, alice.handle)
        expect(again.inside.id()["start"] == before, "a SpecConflict restarted the agent: leave it alone")

    def test_other_secrets_are_no_conflict(self, alice: Agent, driver: Driver, kit: Kit) -> None:
        """Secrets and credentials are not part of the spec's identity."""
        other = kit.spec(alice.spec.agent, values={"token": "t-1"}, stdin=b"x\n")
        try:
            driver.ensure(other)
        except SpecConflict:
            pytest.fail("other secrets raised SpecConflict: compare spec.hash, which leaves them out")

    def test_listed_as_observed(self, alice: Agent, driver: Driver) -> None:
        """`list` yields every agent with the same observation as `observe`."""
        listed = driver.list()
        expect(alice.spec.agent in listed, "list() leaves out a running agent")
        handle, seen = listed[alice.spec.agent]
        expect(handle.name == alice.handle.name, "list() yields another handle name than ensure()")
        own = driver.observe(alice.handle)
        for field in ("state", "endpoint", "spec_hash", "owner_uid"):
            expect(
                getattr(seen, field) == getattr(own, field),
                f"list() returns {field}={getattr(seen, field)!r}, observe() {getattr(own, field)!r}: "
                "make both from the same place",
            )

    def test_environment_arrives(self, driver: Driver, kit: Kit) -> None:
        """`App.environment` arrives byte for byte, with the dispatcher's variables, without the manager's."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KIT_MANAGER_SECRET", "m-1")
            spec = kit.spec("erin", environment={"KIT_ODD": ODD_VALUE, "KIT_EMPTY": ""})
            agent = kit.start(driver, spec)
        inside = agent.inside.environment()
        expect(
            inside.get("KIT_ODD") == ODD_VALUE,
            f"the value {ODD_VALUE!r} arrived as {inside.get('KIT_ODD')!r}: never go through a shell",
        )
        expect(inside.get("KIT_EMPTY") == "", "an empty environment value did not arrive")
        expect(
            "KIT_MANAGER_SECRET" not in inside,
            "the manager's environment reached the app: start from an empty one",
        )
        for name, value in (("DISPATCHER_AGENT", "erin"), ("DISPATCHER_USER", "erin")):
            expect(inside.get(name) == value, f"{name} is {inside.get(name)!r} inside: it must be {value!r}")
        expect(
            inside.get("HOME") == inside.get("DISPATCHER_DATA"),
            f"HOME is {inside.get('HOME')!r}: it must be the data directory",
        )

    @pytest.mark.parametrize("name", ["ø" * 120 + "-" + "漢" * 100, "0.-_+x@example.org:kit"])
    def test_odd_names_run(self, driver: Driver, kit: Kit, name: str) -> None:
        """Agents with very long and unusual names are started, listed, found and destroyed."""
        agent = kit.start(driver, kit.spec(name))
        handle, _ = driver.list().get(name, (None, None))
        expect(
            handle, f"list() does not yield the agent {name!r} under its own name: keep it beside the backend's"
        )
        driver.destroy(agent.handle)
        kit.gone(driver, agent.handle)

    def test_stop_and_start_again(self, driver: Driver, kit: Kit) -> None:
        """`stop` ends the agent and keeps its data, a second `stop` succeeds; `ensure` starts it with the data."""
        agent = kit.start(driver, kit.spec("carol"))
        start = agent.inside.id()["start"]
        agent.inside.write(agent.within("kept"), b"kept\n")
        first = driver.observe(agent.handle).started_at or 0.0
        driver.stop(agent.handle)
        state = driver.state(agent.handle)
        expect(state in ENDED, f"after stop() the agent is {state.value}: return when it is ended")
        self._ended_on_purpose(driver, agent)
        expect(not agent.inside.answers(), "after stop() the endpoint still answers: end every process of it")
        driver.stop(agent.handle)
        again = kit.start(driver, agent.spec)
        expect(again.inside.id()["start"] != start, "after stop() and ensure() the old process still runs")
        expect(again.inside.read(again.within("kept")) == b"kept\n", "stop() and ensure() lost the data")
        second = driver.observe(again.handle).started_at or 0.0
        expect(second > first, "after stop() and ensure() Observation.started_at is the earlier start's")
        listed = driver.list()[again.spec.agent][1].started_at
        expect(
            listed is None or abs(listed - second) < abs(listed - first),
            "after stop() and ensure() list() returns the earlier start in started_at: None is valid, too",
        )

    def test_stopped_agent_takes_another_spec(self, driver: Driver, kit: Kit) -> None:
        """A stopped agent is replaced when its spec changed, its data kept."""
        agent = kit.start(driver, kit.spec("dave"))
        agent.inside.write(agent.within("kept"), b"kept\n")
        driver.stop(agent.handle)
        other = kit.spec("dave", environment={"KIT_NEW": "1"})
        try:
            renewed = kit.start(driver, other)
        except SpecConflict:
            pytest.fail("ensure() of a stopped agent with another spec raised SpecConflict: replace it")
        expect(renewed.inside.environment().get("KIT_NEW") == "1", "a stopped agent kept its old spec: replace it")
        expect(driver.observe(renewed.handle).spec_hash == other.hash, "the replaced agent has the old spec_hash")
        expect(renewed.inside.read(renewed.within("kept")) == b"kept\n", "replacing a stopped agent lost its data")

    def test_stop_sends_sigterm_first(self, driver: Driver, kit: Kit) -> None:
        """`stop` signals the app first and gives it the grace time (unless the class sets `polite` to false)."""
        agent = kit.start(driver, kit.spec("frank"))
        began = time.monotonic()
        driver.stop(agent.handle, grace=self.patience / 2)
        if not self.polite:
            return
        took = time.monotonic() - began
        expect(
            took < self.patience / 2, f"stop() took {took:.1f} s though the app ended at once: wait for its end"
        )
        again = kit.start(driver, agent.spec)
        expect(
            again.inside.refused("/read", path=again.within("saved")) == "",
            "the app was not asked to end: send SIGTERM (or the backend's equivalent) before force",
        )

    @rule("`progress(step, detail")
    def test_stop_kills_after_the_grace_time(self, driver: Driver, kit: Kit) -> None:
        """`stop` against an app that ignores SIGTERM: progress, `Cancelled`, deadline, and force after `grace`."""
        agent = kit.start(driver, kit.spec("grace", environment={"PROBE_IGNORES_SIGTERM": "1"}))
        if self.polite:
            self._stop_cancelled(driver, agent)
        try:
            driver.stop(agent.handle, grace=10 * self.patience, seconds=0.5)
        except DeadlineExceeded:
            driver.stop(agent.handle, grace=0.5)
        expect(
            driver.state(agent.handle) in ENDED,
            "an app that ignores SIGTERM survived stop(): use force after `grace`",
        )
        expect(not agent.inside.answers(), "an app that ignores SIGTERM still answers after stop()")
        self._ended_on_purpose(driver, agent)

    def _stop_cancelled(self, driver: Driver, agent: Agent) -> None:
        grace = min(8.0, self.patience / 2)
        steps, began = Steps(2, cancel), time.monotonic()
        try:
            driver.stop(agent.handle, grace=grace, progress=steps)
        except Cancelled:
            took = time.monotonic() - began
            expect(
                took < 2 + self.slack,
                f"stop() called progress again after {took:.1f} s: at least once a second, it carries the cancel",
            )
            return
        expect(
            driver.state(agent.handle) in ENDED,
            "an app that ignores SIGTERM survived stop(): use force after `grace`",
        )
        expect(
            len(steps.reported) >= 2,
            f"stop() waited {grace:g} s and called progress {len(steps.reported)} times: call it once a second",
        )
        pytest.fail("stop() swallowed Cancelled: let it through")

    @staticmethod
    def _ended_on_purpose(driver: Driver, agent: Agent) -> None:
        reason = driver.observe(agent.handle).exit_reason
        expect(
            not reason,
            f"after stop() the exit reason is {reason!r}: it says why an app ended by itself, so leave it empty",
        )

    def test_stop_reaches_every_process(self, driver: Driver, kit: Kit) -> None:
        """A detached descendant that ignores SIGTERM ends with the agent."""
        agent = kit.start(driver, kit.spec("heidi"))
        path = agent.within("beat")
        agent.inside.post("/heartbeat", path=path)
        expect(
            eventually(lambda: agent.inside.refused("/read", path=path) == "", 5),
            "the probe could not start a second process: agents may fork",
        )
        driver.stop(agent.handle)
        if driver.can(Capability.OWN_DATA):
            return  # the machine itself ended, and its state is checked elsewhere
        beat = agent.spec.data_dir / "beat"
        before = beat.read_bytes()
        time.sleep(0.5)
        expect(
            beat.read_bytes() == before,
            "a detached process outlived stop(): end everything in the agent's cgroup or pid namespace",
        )

    def test_exit_is_reported(self, driver: Driver, kit: Kit) -> None:
        """An app that ends is STOPPED with the actual reason; `ensure` starts it again."""
        for code in (7, 11):
            agent = kit.start(driver, kit.spec("ivan"))
            agent.inside.post("/exit", code=code)
            expect(
                eventually(lambda: driver.state(agent.handle) in ENDED, self.patience),  # noqa: B023 - called here
                "an app that ended by itself is still RUNNING: look at the process, not at what was started",
            )
            seen = driver.observe(agent.handle)
            expect(
                seen.state is BackendState.STOPPED and seen.exit_reason,
                f"an app that ended is {seen.state.value} without a reason: return STOPPED and exit_reason",
            )
            told = self.exit_reason_says.format(code=code)
            expect(
                told in seen.exit_reason,
                f"the app ended with code {code}; the exit reason {seen.exit_reason!r} must contain {told!r}",
            )

    def test_exit_at_once_is_reported(self, driver: Driver, kit: Kit) -> None:
        """An app that ends before it listens: the end is reported, its output kept; `ensure` may raise."""
        spec = kit.spec("judy", environment={"PROBE_EXIT": "7"})
        kit.fresh(driver.handle(spec))
        handle = driver.ensure_doomed(spec)
        expect(
            eventually(lambda: driver.state(handle) in ENDED, self.patience),
            "an app that ended at once is not reported as ended",
        )
        if driver.can(Capability.LOGS):
            expect(
                eventually(lambda: any(b"last words" in line for line in driver.logs(handle)), self.patience, 0.1),
                "the last output of an app that ended at once is lost: users need it to see the cause",
            )
        again = kit.start(driver, kit.spec("judy"))
        expect(again.inside.answers(), "after a start that failed the next one does not work")

    def test_destroy_spares_the_canonical_data(self, driver: Driver, kit: Kit) -> None:
        """`destroy(data=True)` deletes the provider's own data, never the core's directory."""
        spec = kit.spec("leo")
        (spec.data_dir / "mine").write_bytes(b"mine\n")
        agent = kit.start(driver, spec)
        driver.destroy(agent.handle, data=True)
        expect(
            (spec.data_dir / "mine").exists(),
            "destroy(data=True) deleted the canonical data: that is the core's to delete",
        )

    def test_deadline_is_kept(self, driver: Driver, kit: Kit) -> None:
        """With no time left `ensure` raises `DeadlineExceeded` at once; the next one finishes the work."""
        spec = kit.spec("mia")
        kit.fresh(driver.handle(spec))
        with raises(DeadlineExceeded, "ensure() with no time left"):
            driver.ensure(spec, seconds=0.0)
        agent = kit.start(driver, spec)
        expect(agent.inside.answers(), "after a deadline the next ensure() does not finish the work")

    def test_progress_is_reported(self, driver: Driver, kit: Kit) -> None:
        """`ensure` reports its steps, which are shown to the waiting user."""
        steps = Steps()
        spec = kit.spec("nina")
        kit.fresh(driver.handle(spec))
        driver.ensure(spec, progress=steps)
        expect(steps.reported, "ensure() never called progress: call it for each step, it also carries the cancel")

    @pytest.mark.parametrize("call", [1, 2, 3])
    def test_cancel_leaves_nothing(self, driver: Driver, kit: Kit, call: int) -> None:
        """`Cancelled` from `progress` leaves the method, and nothing that it created is left."""
        spec = kit.spec(f"olga{call}")
        handle = driver.handle(spec)
        kit.fresh(handle)
        steps = Steps(call, cancel)
        with self.leaves_nothing(kit, "a cancelled ensure()"):
            try:
                driver.ensure(spec, progress=steps)
            except Cancelled:
                pass
            except DispatcherError as error:
                pytest.fail(f"ensure() turned Cancelled into {type(error).__name__}: let it through")
            else:
                expect(len(steps.reported) < call, "ensure() swallowed Cancelled: let it through")
                driver.destroy(handle)
            kit.gone(driver, handle)
