"""``[groups.NAME]``: what members of a group may use.  Pure.

A user is in the groups that the authenticator names, and in those whose `members` the configuration lists.  Names
of groups are compared exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from pydantic import Field, field_validator

from dispatcher.config.messages import did_you_mean, shown
from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest
from dispatcher.plugin.model import Limits
from dispatcher.plugin.options import MaybeCount, MaybeNumber, MaybeSize, Table


class GroupLimits(Table):
    """``[groups.NAME.limits]``"""

    memory: MaybeSize | None = Field(default=None, description="maximum memory of an agent; false: unlimited")
    swap: MaybeSize | None = Field(default=None, description="maximum swap space; false: unlimited")
    cpus: MaybeNumber | None = Field(default=None, description="maximum CPU cores; false: unlimited")
    pids: MaybeCount | None = Field(default=None, description="maximum number of processes; false: unlimited")
    disk: MaybeSize | None = Field(default=None, description="maximum size of the data; false: unlimited")


class GroupConfig(Table):
    """``[groups.NAME]``; NAME is spelled as the authenticator spells it."""

    members: list[str] = Field(
        default=[], description="names of users, in addition to the members that the authenticator reports"
    )
    apps: list[str] = Field(
        default=[],
        description="apps for members only; an app in several groups is for members of any of them, "
        "an app in no group for everybody",
    )
    limits: GroupLimits = Field(
        default=GroupLimits(),
        description="replace the limits of apps; of several groups the highest limit holds",
    )

    @field_validator("members")
    @classmethod
    def _members(cls, value: list[str]) -> list[str]:
        try:
            return [names.user_name(name) for name in value]
        except BadRequest as error:
            raise ValueError(f"names of users; {error}") from error


Groups = Mapping[str, GroupConfig]


def faults(groups: object, apps: Collection[str]) -> Iterator[str]:
    """Yield the apps of groups that do not exist.

    :param groups: the table ``[groups]`` as it was read.
    """
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        listed = group.get("apps") if isinstance(group, Mapping) else None
        for app in listed if isinstance(listed, list) else ():
            if isinstance(app, str) and app not in apps:
                hint = did_you_mean(app, apps, f"there are: {', '.join(apps) or 'none'}")
                yield f"groups.{name}.apps: there is no app {shown(app)}, {hint}"


def groups_of(groups: Groups, user: str, external: Collection[str]) -> frozenset[str]:
    """Return all groups of a user.

    :param external: those that the authenticator named.
    """
    return frozenset(external) | {name for name, group in groups.items() if user in group.members}


def owners(groups: Groups, app: str) -> list[str]:
    """Return the groups whose members alone may use an app; none if everybody may."""
    return [name for name, group in groups.items() if app in group.apps]


def may_use(groups: Groups, app: str, member_of: Collection[str]) -> bool:
    """Whether members of these groups may use an app."""
    wanted = owners(groups, app)
    return not wanted or any(name in member_of for name in wanted)


def limits(groups: Groups, member_of: Collection[str], of_app: Limits) -> Limits:
    """Return the limits of an agent of a user in these groups."""
    changed: dict[str, float | None] = {}
    for field in GroupLimits.model_fields:
        found = [
            value
            for name, group in groups.items()
            if name in member_of and (value := getattr(group.limits, field)) is not None
        ]
        if found:
            changed[field] = None if False in found else max(found)
    if not changed:
        return of_app
    return dataclasses.replace(of_app, **changed, defaults=of_app.defaults.difference(changed))  # type: ignore[arg-type]
