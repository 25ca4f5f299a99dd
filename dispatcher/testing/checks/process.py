"""Tier *core*, second part: what an app finds when it starts, the same with every provider.  No opt-out."""

from __future__ import annotations

from dispatcher.testing.base import Contract, needs_no, rule
from dispatcher.testing.driver import expect
from dispatcher.testing.kit import DATA_VARIABLE, Agent


class ProcessChecks(Contract, page="docs/howto/run-your-app.md"):
    """Working directory, umask, placeholders."""

    @rule("also the working directory")
    def test_working_directory_is_the_data(self, alice: Agent) -> None:
        """The app starts in its data directory, unless its options name another one."""
        found = alice.inside.id().get("cwd")
        expect(
            found == alice.within(),
            f"the app's working directory is {found!r}: change to its data directory ({alice.within()!r}) before "
            "the command",
        )

    @needs_no("umask_of_image")
    @rule("its umask is 007")
    def test_umask_is_007(self, alice: Agent) -> None:
        """The umask is 007: the proxy's group may connect to what the app creates, others may read nothing."""
        found = alice.inside.id().get("umask")
        expect(
            found and int(found, 8) == 0o007,
            f"the app's umask is {found}: set 007, whatever the manager's is, or set `umask_of_image`",
        )

    @rule("in its command (and in values of")
    def test_placeholders_in_the_environment_are_replaced(self, alice: Agent) -> None:
        """`{data}` in a value of `App.environment` is the data directory as seen from inside."""
        found = alice.inside.environment().get(DATA_VARIABLE)
        expect(
            found == f"<{alice.within()}>",
            f"the value '<{{data}}>' arrived as {found!r}: replace it by '<{alice.within()}>'",
        )

    @needs_no("no_command")
    @rule("in its command (and in values of")
    def test_placeholders_in_the_command_are_replaced(self, alice: Agent) -> None:
        """`{data}` in an argument of the command is the data directory as seen from inside."""
        last = alice.inside.get("/argv").rstrip(b"\0").split(b"\0")[-1].decode(errors="replace")
        if last != alice.within() and "{data}" not in last:
            self._must("app_options() so that the command ends with the argument {data}, or set no_command")
        expect(
            last == alice.within(),
            f"the argument '{{data}}' arrived as {last!r}: replace it by {alice.within()!r}",
        )
