"""Settings and hooks for the author of a provider, and the fixtures of the checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NoReturn

import pytest

from dispatcher.plugin.model import Capability, Handle, Network
from dispatcher.plugin.provider import Provider, ProviderContext
from dispatcher.testing.driver import Driver
from dispatcher.testing.kit import Agent, Kit, Settings

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
    #: Text in the exit reason of an app that ended with code 7; "" where only the end is visible.
    exit_reason_says: ClassVar[str] = "7"
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
    #: so.  Keys: endpoint, files, processes, uid, capabilities, network.
    unpromised: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Leave out the checks of the backend where `no_backend` is set."""
        super().__init_subclass__(**kwargs)
        if cls.no_backend:
            for name in dir(cls):
                if getattr(getattr(cls, name), "needs_backend", False):
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

        Every agent of it must start the probe on the endpoint that `observe` returns.
        """
        self._must("app_options()")

    def missing_options(self) -> Mapping[str, Any]:
        """Return valid options whose image or program does not exist on the backend.  Must be overridden."""
        self._must("missing_options()")

    def leftovers(self, installation: str) -> set[str]:
        """Ask the backend, not the provider, what exists of this installation.  Must be overridden.

        A word or two for each thing: container, network, volume, domain, disk, process group, ...
        """
        self._must("leftovers(installation)")

    def inspect(self, handle: Handle) -> str:
        """Return everything that the backend shows about an agent.  Must be overridden.

        The output of its own inspection tool; command lines and environments count.
        """
        self._must("inspect(handle)")

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

    @pytest.fixture
    def context(self, request: pytest.FixtureRequest) -> ProviderContext:
        """What the core would give to the provider."""
        return self._kit(request).context

    @pytest.fixture
    def driver(self, provider: Provider) -> Driver:
        """The provider under test, each call checked."""
        return Driver(provider, patience=self.patience, slack=self.slack)

    @pytest.fixture
    def kit(self, request: pytest.FixtureRequest, provider: Provider) -> Iterator[Kit]:
        """The world of this class; agents of the check are gone afterwards."""
        kit = self._kit(request)
        if kit.sibling is None:
            kit.sibling = Driver(self.another(provider), patience=self.patience, slack=self.slack)
        yield kit
        kit.end_check()

    @pytest.fixture
    def alice(self, kit: Kit) -> Agent:
        """A running agent that checks share.  Leave it running and its data alone."""
        assert kit.sibling
        return kit.shared(kit.sibling, "alice")

    @pytest.fixture
    def bob(self, kit: Kit) -> Agent:
        """Another running agent, of another user."""
        assert kit.sibling
        return kit.shared(kit.sibling, "bob")

    def can(self, driver: Driver, capability: Capability) -> bool:
        """Whether the provider declares `capability`."""
        return driver.can(capability)

    def _kit(self, request: pytest.FixtureRequest) -> Kit:
        node = request.node.getparent(pytest.Class)
        kit: Kit | None = node.stash.get(_KITS, None)
        if kit is None:
            kit = node.stash[_KITS] = Kit(
                Settings(
                    patience=self.patience,
                    slack=self.slack,
                    network=self.network,
                    app_options=self.app_options,
                )
            )
            node.addfinalizer(kit.close)
        return kit

    def _must(self, what: str) -> NoReturn:
        pytest.fail(f"{type(self).__name__} must override {what}; see dispatcher.testing.Contract")


def needs_backend(check: Any) -> Any:
    """Mark a check that needs a backend which can be broken."""
    check.needs_backend = True
    return check
