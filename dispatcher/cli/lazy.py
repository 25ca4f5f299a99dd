"""The group of all commands, which are imported when they run.

The table of commands holds each one's one-line help, so that ``--help`` imports none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from dispatcher.cli.context import Cli, did_you_mean
from dispatcher.plugin.errors import NotFound


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


#: What other programs call a command of ours.
SYNONYMS = {
    "create": "add",
    "delete": "remove",
    "del": "remove",
    "kill": "stop",
    "log": "logs",
    "ls": "list",
    "new": "add",
    "ps": "running",
    "rm": "remove",
    "show": "info",
    "status": "info",
    "up": "serve",
    "users": "list",
}


class LazyGroup(click.Group):
    """A group made of sections, each a heading with its commands.  Its own options may follow the command, too.

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
            meant = did_you_mean(SYNONYMS.get(args[0], args[0]), known)
            raise click.UsageError(f"There is no command {args[0]!r}{meant}", ctx)
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        takes_value = {
            name: not option.is_flag
            for option in self.params
            if isinstance(option, click.Option)
            for name in option.opts
        }
        own: list[str] = []
        others: list[str] = []
        words = iter(args)
        for word in words:
            name, has_value, _ = word.partition("=")
            if word == "--":
                others += [word, *words]
            elif name not in takes_value:
                others.append(word)
            elif has_value or not takes_value[name]:
                own.append(word)
            elif (value := next(words, None)) is not None:
                own += [word, value]
            else:
                raise click.BadOptionUsage(word, f"Option {word!r} requires an argument", ctx)
        return super().parse_args(ctx, own + others)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NotFound as error:
            raise ctx.ensure_object(Cli).with_nearest_name(error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max((len(name) for name in self.lazy), default=0)
        for heading, commands in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), lazy.help) for name, lazy in commands.items()])
