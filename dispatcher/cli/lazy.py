"""A click group whose commands are imported when they run.

The table of commands holds each one's one-line help, so that ``--help`` imports none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click


@dataclass(frozen=True)
class Lazy:
    """A command ``dispatcher.cli.commands.MODULE:ATTRIBUTE`` and its one-line help."""

    module: str
    attribute: str
    help: str

    def load(self) -> click.Command:
        """Import the command."""
        command = getattr(importlib.import_module(f"dispatcher.cli.commands.{self.module}"), self.attribute)
        assert isinstance(command, click.Command)
        return command


class LazyGroup(click.Group):
    """A group made of sections, each a heading with its commands.

    :param sections: heading -> name -> command.
    :param aliases: other spellings, not shown in the help.
    """

    def __init__(
        self,
        *args: Any,
        sections: Mapping[str, Mapping[str, Lazy]] | None = None,
        aliases: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections or {}
        self.aliases = aliases or {}
        self.lazy = {name: lazy for section in self.sections.values() for name, lazy in section.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = self.aliases.get(cmd_name, cmd_name)
        lazy = self.lazy.get(name)
        return lazy.load() if lazy else super().get_command(ctx, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args[0] not in known and args[0] not in self.aliases and not args[0].startswith("-"):
            raise click.UsageError(f"There is no command {args[0]!r}{did_you_mean(args[0], known)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max((len(name) for name in self.lazy), default=0)
        for heading, commands in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), lazy.help) for name, lazy in commands.items()])


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return ``: did you mean 'X'?`` for the nearest of `known`, or nothing."""
    import difflib

    near = difflib.get_close_matches(word, known, 1)
    return f": did you mean {near[0]!r}?" if near else ""
