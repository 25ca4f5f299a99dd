"""The environment of one conformance run: directories, user ids, agents, and cleanup."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import pytest

from dispatcher.plugin.errors import DispatcherError, NotFound
from dispatcher.plugin.model import AgentSpec, App, BackendState, Handle
from dispatcher.plugin.provider import Provider, ProviderContext
from dispatcher.plugin.secret_files import in_memory
from dispatcher.testing.driver import Driver, expect
from dispatcher.testing.probe_client import Inside

if TYPE_CHECKING:
    from dispatcher.testing.base import Contract

#: Variable of every app of the kit that sets no environment of its own: whether its placeholder is replaced.
DATA_VARIABLE = "KIT_DATA"
_T = TypeVar("_T")


@dataclass
class Agent:
    """One agent of a check: its spec, its handle and the view from inside."""

    spec: AgentSpec
    handle: Handle
    inside: Inside

    def within(self, *parts: str) -> str:
        """Return a path in the data directory as it is seen from inside."""
        root = self.inside.environment().get("DISPATCHER_DATA")
        if not root:
            pytest.fail(
                "the app has no DISPATCHER_DATA in its environment: set it to the data directory's path inside"
            )
        return "/".join([root, *parts])


class Kit:
    """Creates specs and agents for the checks of one class, and removes what is left."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.installation = secrets.token_hex(4)
        self.root = Path(tempfile.mkdtemp(prefix="kit-"))
        self.root.chmod(0o711)
        self.privileged = os.geteuid() == 0
        self._uids = iter(range(random.randrange(300_000, 2_000_000) * 1000, 2**31))  # noqa: S311 - no secret
        self.proxy_gid = next(self._uids) if self.privileged else os.getegid()
        self.context = self.make_context(self.installation)
        self.sibling: Driver | None = None
        self._specs: dict[tuple[str, str], AgentSpec] = {}
        self._shared: dict[str, Agent] = {}
        self._fresh: list[Handle] = []
        self._lock = threading.Lock()

    def use(self, provider: Provider) -> Driver:
        """Return the driver that starts shared agents and removes all: of an instance like `provider`."""
        if self.sibling is None:
            self.sibling = self.contract.drive_another(provider)
        return self.sibling

    def make_context(self, installation: str) -> ProviderContext:
        """Return what the core would give to a provider, for one installation."""
        (self.root / installation).mkdir(mode=0o711, exist_ok=True)
        state, run = (self.root / installation / name for name in ("state", "run"))
        for directory in (state, run):
            directory.mkdir(mode=0o700, exist_ok=True)
        return ProviderContext(
            installation=installation,
            state_dir=state,
            run_dir=run,
            proxy_gid=self.proxy_gid,
            privileged=self.privileged,
        )

    # -- specs -------------------------------------------------------------------------------------------

    def app(self, options: Mapping[str, Any] | None = None, **changes: Any) -> App:
        """Return an app that runs the probe; `changes` are fields of `App` (limits, network, ...)."""
        assert self.sibling
        provider = self.sibling.provider
        chosen = provider.AppOptions.model_validate(
            dict(self.contract.app_options() if options is None else options)
        )
        changes = {"network": self.contract.network, "environment": {DATA_VARIABLE: "<{data}>"}} | changes
        return App(name="kit", provider=provider.name, options=chosen, **changes)

    def spec(
        self,
        agent: str,
        *,
        options: Mapping[str, Any] | None = None,
        installation: str = "",
        values: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        **changes: Any,
    ) -> AgentSpec:
        """Return the spec of an agent, its directories made; one name always has the same ids and paths.

        :param values: its secrets; :param changes: fields of its `App`.
        """
        key = installation or self.installation, agent
        app = self.app(options, **changes)
        with self._lock:
            if key not in self._specs:
                self._specs[key] = self._new_spec(app, *key)
            known = self._specs[key]
        return replace(known, app=app, secrets=dict(values or {}), stdin=stdin)

    def _new_spec(self, app: App, installation: str, agent: str) -> AgentSpec:
        uid, gid = [next(self._uids)] * 2 if self.privileged else (os.geteuid(), os.getegid())
        home = self.root / installation / secrets.token_hex(4)
        home.mkdir(mode=0o711)
        spec = AgentSpec(
            installation=installation,
            agent=agent,
            user=agent.partition(":")[0],
            app=app,
            uid=uid,
            gid=gid,
            proxy_gid=self.proxy_gid,
            data_dir=home / "data",
            run_dir=home / "run",
            log_dir=home / "log",
        )
        for directory, mode, owner, group in (
            (spec.data_dir, 0o700, uid, gid),
            (spec.run_dir, 0o2710, uid, self.proxy_gid),
            (spec.log_dir, 0o700, os.geteuid(), os.getegid()),
        ):
            directory.mkdir()
            if self.privileged:
                os.chown(directory, owner, group)
            directory.chmod(mode)
        return spec

    # -- agents ------------------------------------------------------------------------------------------

    def start(self, driver: Driver, spec: AgentSpec, *, ready: bool = True) -> Agent:
        """Ensure an agent that is gone after the check; wait until its probe answers."""
        self.fresh(driver.handle(spec))
        handle = driver.ensure(spec)
        return self.reach(driver, spec, handle, ready=ready)

    def fresh(self, handle: Handle) -> None:
        """Remember to destroy this one after the check."""
        with self._lock:
            self._fresh.append(handle)

    def shared(self, driver: Driver, name: str) -> Agent:
        """Return a running agent that checks share and leave running; made when it is not there."""
        with self._lock:
            known = self._shared.get(name)
        if known and known.inside.answers():
            return known
        spec = known.spec if known else self.spec(name)
        agent = self.reach(driver, spec, driver.ensure(spec))
        with self._lock:
            self._shared[name] = agent
        return agent

    def share(self, driver: Driver, names: Sequence[str]) -> list[Agent]:
        """Return several shared agents, started at the same time."""
        return self.together([partial(self.shared, driver, name) for name in names])

    def reach(self, driver: Driver, spec: AgentSpec, handle: Handle, *, ready: bool = True) -> Agent:
        """Return the agent of a handle, once its endpoint is known and (with `ready`) its probe answers."""
        end = time.monotonic() + self.contract.patience
        while True:
            seen = driver.observe(handle)
            if seen.state not in {BackendState.RUNNING, BackendState.STARTING}:
                pytest.fail(
                    f"an agent that ensure() started is {seen.state.value} ({seen.exit_reason or seen.detail}); "
                    f"is app_options() right?{self._last_words(driver, handle)}"
                )
            if seen.endpoint:
                inside = Inside(seen.endpoint, seen.owner_uid, timeout=self.contract.patience)
                if not ready or inside.answers():
                    return Agent(spec=spec, handle=handle, inside=inside)
            if time.monotonic() > end:
                pytest.fail(
                    f"the probe does not answer at {seen.endpoint} within {self.contract.patience:.0f} s: does "
                    "the observation name the endpoint, and do app_options() run the probe there?"
                    + self._last_words(driver, handle)
                )
            time.sleep(0.02)

    @staticmethod
    def _last_words(driver: Driver, handle: Handle) -> str:
        with contextlib.suppress(DispatcherError):
            lines = b" | ".join(driver.logs(handle, tail=5, seconds=5)).decode(errors="replace")
            return f"  Its last output: {lines}"
        return ""

    def gone(self, driver: Driver, handle: Handle) -> None:
        """Expect that an agent is absent and not listed."""
        seen = driver.observe(handle)
        expect(
            seen.state is BackendState.ABSENT,
            f"observe() returns {seen.state.value} for an agent that does not exist: it must return ABSENT",
        )
        expect(
            handle.agent not in driver.list(),
            "list() still yields an agent that was destroyed: leave nothing of it on the backend",
        )

    def together(self, calls: Sequence[Callable[[], _T]]) -> list[_T]:
        """Run all calls at the same time; return their results, raise the first failure."""
        with ThreadPoolExecutor(max_workers=max(1, len(calls))) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]

    # -- the end -----------------------------------------------------------------------------------------

    def end_check(self) -> None:
        """Destroy what the check started."""
        with self._lock:
            handles = {handle.name: handle for handle in self._fresh}
            self._fresh.clear()
        if driver := self.sibling:
            self.together([partial(driver.destroy, handle) for handle in handles.values()])

    def close(self) -> None:
        """Destroy everything, and the directories."""
        try:
            if driver := self.sibling:
                with contextlib.suppress(DispatcherError):
                    for handle, _ in driver.list().values():
                        with contextlib.suppress(NotFound):
                            driver.destroy(handle)
                driver.close()
        finally:
            shutil.rmtree(self.root, ignore_errors=True)


def eventually(condition: Callable[[], object], seconds: float, pause: float = 0.02) -> bool:
    """Whether `condition` becomes true within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


def processes_of(uid: int) -> list[int]:
    """Return the pids of this host whose real user id is `uid`, zombies left out."""
    running = [one.info for one in psutil.process_iter(["pid", "status", "uids"])]
    return [
        one["pid"]
        for one in running
        if one["uids"] and one["uids"].real == uid and one["status"] != psutil.STATUS_ZOMBIE
    ]


def zombies_of(uid: int | None = None) -> set[int]:
    """Return the pids of ended processes that nobody has waited for: children of this one, and those of a user.

    Orphans are left out: process 1 waits for them.
    """
    return {
        one.info["pid"]
        for one in psutil.process_iter(["pid", "ppid", "status", "uids"])
        if one.info["status"] == psutil.STATUS_ZOMBIE
        and one.info["ppid"] != 1
        and (one.info["ppid"] == os.getpid() or (one.info["uids"] and one.info["uids"].real == uid))
    }


def processes_holding(needle: bytes) -> list[str]:
    """Return the command lines and environments in /proc that hold `needle`, of this process left out."""
    found = []
    for path in (*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")):
        with contextlib.suppress(OSError):
            if path.parent.name != str(os.getpid()) and needle in path.read_bytes():
                found.append(str(path))
    return found


def files_holding(needle: bytes, root: Path, *, on_disk: bool = False) -> list[str]:
    """Return the regular files below `root` that hold `needle`.

    :param on_disk: leave out file systems that are kept in memory.
    """
    found = []
    for path in root.rglob("*"):
        with contextlib.suppress(OSError):
            if (
                stat.S_ISREG(path.lstat().st_mode)
                and not (on_disk and in_memory(path))
                and needle in path.read_bytes()
            ):
                found.append(str(path))
    return found
