"""The table ``[auth.pam]``."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from dispatcher.plugin import Count, Duration, Table, matching


def _not_other(value: str) -> str:
    if value == "other":  # libpam's own, for services without a file
        raise ValueError("a service of its own, such as dispatcher")
    return value


Service = Annotated[
    str,
    AfterValidator(matching(r"[a-z0-9][a-z0-9._-]{0,63}", "the name of a file in /etc/pam.d, in lower case")),
    AfterValidator(_not_other),
]
Group = Annotated[str, AfterValidator(matching(r"[^\s:,]{1,255}", "the name of a group of this host"))]


class PamOptions(Table):
    """``[auth.pam]``."""

    service: Service = Field(default="dispatcher", description="PAM service: the file /etc/pam.d/SERVICE")
    allow_groups: list[Group] = Field(
        default=[],
        description="only members of one of these groups of this host may sign in; by default, all users",
    )
    min_uid: Count = Field(
        default=1000,
        ge=100,
        lt=2**32,
        description="lowest user id that may sign in: not root, not accounts of services",
    )
    refusal_time: Duration = Field(
        default=2.0,
        ge=0.1,
        le=10,
        description="time until a refusal is answered, so that it does not show which accounts exist",
    )
