"""Settings and hooks for the author of a provider, and the fixtures of the checks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NoReturn, TypeVar

import pytest

from dispatcher.plugin.model import Capability, Depth, Handle, Network
from dispatcher.plugin.provider import Provider, ProviderContext
from dispatcher.testing.driver import Driver, expect
from dispatcher.testing.fixtures import limit_fixtures
from dispatcher.testing.kit import Agent, Kit, eventually
from dispatcher.testing.verdict import Hangs, judging, register, within

SLEEP = {Depth.RAM: Capability.SUSPEND, Depth.DISK: Capability.HIBERNATE}
_Check = TypeVar("_Check", bound=Callable[..., None])
_KITS = pytest.StashKey[Kit]()


class Contract:
    """Settings, hooks for the author, fixtures.

    Must be overridden: the fixture `provider`, `app_options`, `missing_options`, `leftovers`, `inspect` and,
    unless `no_backend` says why there is none, `broken_backend`.  All else may be.
    """

    #: Maximum seconds of one operation, such as a start until the probe answers.
    patience: ClassVar[float] = 15.0
    #: Seconds that a call may take past its deadline.
    slack: ClassVar[float] = 2.0
    #: Agents that are started at the same time.
    many: ClassVar[int] = 6
    #: Why no backend can be down ("processes of this machine"); empty if one can.
    no_backend: ClassVar[str] = ""
    #: Text in the exit reason of an app that ended by itself; {code} stands for its exit code.
    exit_reason_says: ClassVar[str] = "{code}"
    #: Whether `stop` signals the app before it uses force, so that the app can save its data.
    polite: ClassVar[bool] = True
    #: `network` of the apps in checks that do not test networks.
    network: ClassVar[Network] = Network.NONE
    #: Seconds within which `watch` reports a change.
    event_seconds: ClassVar[float] = 2.0
    #: Lines of 100 bytes that the log checks write.
    log_lines: ClassVar[int] = 20_000
    #: Bytes of memory that the memory limit's check allows; the probe takes twice as much.
    memory_limit: ClassVar[int] = 64 * 1024 * 1024
    #: Promises of isolation that this provider does not make, each with words that `explain` must use to say
    #: so.  Keys: endpoint, files, processes, uid, capabilities, network, sockets.
    unpromised: ClassVar[Mapping[str, str]] = {}

    #: Why the provider cannot set the app's umask ("the engine sets it"); empty if it does.
    umask_of_image: ClassVar[str] = ""
    #: Why apps have no command of their own ("the image's program"); empty if they have.
    no_command: ClassVar[str] = ""
    #: Why no distribution declares the provider ("a test's own"); empty if one does.
    no_entry_point: ClassVar[str] = ""

    def __init_subclass__(cls, page: str = "", **kwargs: Any) -> None:
        """Leave out the checks for which the class states that there is nothing to check.

        :param page: of the documentation, about the checks that the class defines.
        """
        super().__init_subclass__(**kwargs)
        if page:
            for name, check in list(vars(cls).items()):
                if name.startswith("test_"):
                    setattr(cls, name, register(check, page, getattr(check, "rule", "")))
        for name in dir(cls):
            setting = getattr(getattr(cls, name), "left_out_by", "")
            if setting and getattr(cls, setting):
                setattr(cls, name, None)

    # -- for the author ----------------------------------------------------------------------------------

    @pytest.fixture
    def provider(self, context: ProviderContext) -> Provider:
        """Return the provider under test, made with `context`.  Must be overridden.

        All instances of one class use one backend.  Close it in the fixture if it needs closing.
        """
        self._must("the fixture provider(self, context)")

    def app_options(self) -> Mapping[str, Any]:
        """Return ``[apps.X.NAME]`` that runs the probe (`PROBE`).  Must be overridden.

        Every agent of it must start the probe on the endpoint that `observe` returns.  The last argument of the
        command is `{data}`, which the probe ignores.
        """
        self._must("app_options()")

    def missing_options(self) -> Mapping[str, Any]:
        """Return valid options whose image or program does not exist on the backend.  Must be overridden."""
        self._must("missing_options()")

    def leftovers(self, context: ProviderContext) -> set[str]:
        """Ask the backend, not the provider, what exists of an installation.  Must be overridden.

        A word or two for each thing: container, network, volume, domain, disk, process group, ...

        :param context: what the provider of that installation got; all files of its agents are below
            `context.state_dir.parent`.
        """
        self._must("leftovers(context)")

    def inspect(self, handle: Handle, context: ProviderContext) -> str:
        """Return everything that the backend shows about an agent.  Must be overridden.

        The output of its own inspection tool; command lines and environments count.

        :param context: what the agent's provider got.
        """
        self._must("inspect(handle, context)")

    def broken_backend(self, how: str) -> AbstractContextManager[None]:
        """Return a context in which the backend is broken.  Must be overridden unless `no_backend` is set.

        :param how: "down" (connections fail) or "silent" (it accepts requests and does not answer).
        """
        self._must(f"broken_backend({how!r}), or set no_backend to the reason why there is none")

    def another(self, provider: Provider, context: ProviderContext | None = None) -> Provider:
        """Return a fresh instance for the same backend, perhaps for another installation."""
        return type(provider)(context=context or provider.context, options=provider.options)

    def backend_sockets(self) -> list[str]:
        """Return endpoints (``unix:PATH``, ``tcp:HOST:PORT``) of the backend that no agent may reach."""
        return []

    # -- fixtures ----------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _limited_fixtures(self, request: pytest.FixtureRequest) -> None:
        """Limit the time of the author's fixture."""
        limit_fixtures(request)

    @pytest.fixture
    def context(self, request: pytest.FixtureRequest) -> ProviderContext:
        """What the core would give to the provider."""
        return self._kit(request).context

    @pytest.fixture
    def driver(self, provider: Provider) -> Driver:
        """The provider under test, each call checked."""
        return self.drive(provider)

    @pytest.fixture
    def other(self, provider: Provider) -> Iterator[Driver]:
        """A fresh instance for the same backend, as a restarted manager makes one."""
        with judging("making an instance"):
            other = self.drive_another(provider)
        yield other
        other.close()

    @pytest.fixture
    def kit(self, request: pytest.FixtureRequest, provider: Provider) -> Iterator[Kit]:
        """The world of this class; agents of the check are gone afterwards."""
        kit = self._kit(request)
        with judging("making an instance"):
            kit.use(provider)
        yield kit
        with judging("cleaning up"):
            kit.end_check()

    @pytest.fixture
    def alice(self, kit: Kit, provider: Provider) -> Agent:
        """A running agent that checks share.  Leave it running and its data alone."""
        with judging("starting an agent"):
            return kit.shared(kit.use(provider), "alice")

    @pytest.fixture
    def bob(self, kit: Kit, provider: Provider) -> Agent:
        """Another running agent, of another user."""
        with judging("starting an agent"):
            return kit.shared(kit.use(provider), "bob")

    def drive(self, provider: Provider) -> Driver:
        """Return a driver for an instance."""
        return Driver(provider, patience=self.patience, slack=self.slack)

    def drive_another(self, provider: Provider, context: ProviderContext | None = None) -> Driver:
        """Return a driver for a fresh instance, perhaps for another installation."""
        __tracebackhide__ = True
        name = type(provider).__name__
        try:
            return self.drive(within(self.patience, lambda: self.another(provider, context)))
        except Hangs:
            pytest.fail(f"{name}() has not returned after {self.patience:.0f} s: connect in check() or later")

    @contextlib.contextmanager
    def leaves_nothing(self, kit: Kit, what: str, seconds: float = 0.0) -> Iterator[None]:
        """Expect that the backend holds nothing new `seconds` after the block.

        :param what: the culprit, for the message.
        """
        before = self.leftovers(kit.context)
        yield
        expect(
            eventually(lambda: not self.leftovers(kit.context) - before, seconds, 0.1),
            f"{what} left {sorted(self.leftovers(kit.context) - before)} behind: remove what it made",
        )

    def _kit(self, request: pytest.FixtureRequest) -> Kit:
        node = request.node.getparent(pytest.Class)
        if _KITS not in node.stash:
            node.stash[_KITS] = Kit(self)
            node.addfinalizer(functools.partial(_close, node.stash[_KITS]))
        kit: Kit = node.stash[_KITS]
        return kit

    def _must(self, what: str) -> NoReturn:
        pytest.fail(f"{type(self).__name__} must override {what}; see dispatcher.testing.Contract")


def _close(kit: Kit) -> None:
    with judging("cleaning up"):
        kit.close()


def needs_no(setting: str) -> Callable[[_Check], _Check]:
    """Mark a check that is left out where a setting of the class gives a reason."""

    def mark(check: _Check) -> _Check:
        vars(check)["left_out_by"] = setting
        return check

    return mark


#: A check that needs a backend which can be broken.
needs_backend = needs_no("no_backend")


def rule(words: str) -> Callable[[_Check], _Check]:
    """Name the words of the contract's text (dispatcher/plugin/provider.py) that a check is about."""

    def mark(check: _Check) -> _Check:
        vars(check)["rule"] = words
        return check

    return mark


def needs(capability: Capability | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a check of a capability: nothing to check where the provider does not declare it.

    :param capability: by default the one of the check's argument `depth`.
    """

    def wrap(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def wrapped(self: Contract, *, driver: Driver, **fixtures: Any) -> None:
            if driver.can(capability or SLEEP[fixtures["depth"]]):
                check(self, driver=driver, **fixtures)

        return wrapped

    return wrap
