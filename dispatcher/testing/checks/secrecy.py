"""Tier *credentials and secrets*: they arrive, and are visible nowhere else."""

from __future__ import annotations

import secrets
from typing import Any

import pytest

from dispatcher.plugin.model import Capability
from dispatcher.testing.base import Contract
from dispatcher.testing.driver import Driver, expect
from dispatcher.testing.kit import Agent, Kit, files_holding, processes_holding
from dispatcher.testing.verdict import judging


class SecrecyChecks(Contract, page="docs/howto/give-secrets-to-an-app.md"):
    """Nothing secret in argv, environment, labels, inspection, handles, logs or on disk."""

    @pytest.fixture
    def secret(self) -> str:
        """A value that nothing else holds."""
        return f"kit-secret-{secrets.token_hex(12)}"

    @pytest.fixture
    def keeper(self, driver: Driver, kit: Kit, secret: str) -> Agent:
        """A running agent that has the secret, and credentials where the provider takes them."""
        stdin = None
        changes: dict[str, Any] = {}
        if driver.can(Capability.CREDENTIALS):
            changes = {"credentials": "stdin"}
            stdin = secret.encode() + b"-login\n"
        values = {"token": secret, "multi": "line 1\nline 2\n"}
        with judging("starting an agent with secrets"):
            return kit.start(driver, kit.spec("keeper", values=values, stdin=stdin, **changes))

    def test_secrets_arrive_as_files(self, keeper: Agent, secret: str) -> None:
        """Each secret is a file in the directory that DISPATCHER_SECRETS names, readable by the agent alone."""
        directory = keeper.inside.environment().get("DISPATCHER_SECRETS")
        expect(directory, "DISPATCHER_SECRETS is not in the environment: name the directory with the secrets")
        expect(
            keeper.inside.read(f"{directory}/token") == secret.encode(),
            "a secret did not arrive byte for byte as a file of its name in DISPATCHER_SECRETS",
        )
        expect(
            keeper.inside.read(f"{directory}/multi") == b"line 1\nline 2\n", "a secret of two lines did not arrive"
        )
        mode = keeper.inside.get("/stat", path=f"{directory}/token").split()[2].decode()
        expect(
            int(mode, 8) & 0o077 == 0, f"the secret's file has the mode {mode}: readable by the agent alone (0400)"
        )

    def test_secrets_are_not_exposed(
        self, keeper: Agent, secret: str, driver: Driver, kit: Kit, caplog: pytest.LogCaptureFixture
    ) -> None:
        """No secret in command lines, environments, the backend's inspection, handles, logs or files on disk."""
        needle = secret.encode()
        shown = processes_holding(needle)
        expect(not shown, f"a secret shows in {shown}: never pass it by argument or environment")
        expect(
            secret not in keeper.inside.environment().values(), "a secret is in the app's environment: use files"
        )
        expect(
            secret not in self.inspect(keeper.handle, kit.context),
            "a secret shows in the backend's inspection (labels, env, args)",
        )
        found = driver.list()[keeper.spec.agent]
        for what, text in {
            "the handle": repr(keeper.handle),
            "list()": repr(found),
            "observe()": repr(driver.observe(keeper.handle)),
            "the provider's log": caplog.text,
        }.items():
            expect(secret not in text, f"a secret shows in {what}")
        disk = files_holding(needle, kit.root, on_disk=True)
        expect(not disk, f"a secret lies on disk in {disk}: keep it in memory (tmpfs, pipe, memfd)")
        if driver.can(Capability.LOGS):
            lines = driver.logs(keeper.handle)
            expect(not any(needle in line for line in lines), "a secret shows in the agent's log")

    def test_secrets_are_private_to_the_agent(self, keeper: Agent, alice: Agent) -> None:
        """Another agent cannot read them by the same path."""
        if {"files", "uid"} <= set(self.unpromised):
            return
        directory = keeper.inside.environment().get("DISPATCHER_SECRETS")
        for path in (f"{directory}/token", str(keeper.spec.run_dir)):
            expect(
                alice.inside.refused("/read" if path.endswith("token") else "/list", path=path),
                f"one agent can read another's secret at {path}",
            )

    def test_errors_contain_no_secret(
        self, driver: Driver, kit: Kit, secret: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An error and the log of a start that failed hold no secret."""
        spec = kit.spec(
            "keeper-fails",
            options=self.missing_options(),
            values={"token": secret},
            stdin=secret.encode(),
        )
        kit.fresh(driver.handle(spec))
        with pytest.raises(Exception) as caught:  # noqa: PT011 - judged elsewhere, here only its words
            driver.ensure(spec)
        error: BaseException | None = caught.value
        while error:
            expect(secret not in str(error), f"a secret shows in the error {type(error).__name__}")
            error = error.__cause__ or error.__context__
        expect(secret not in caplog.text, "a secret shows in the provider's log")
