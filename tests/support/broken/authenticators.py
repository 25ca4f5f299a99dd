"""Authenticators that work but for one fault; `CASES` says what a sign-in leads to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from dispatcher.plugin import (
    BadRequest,
    Cancelled,
    DispatcherError,
    Forbidden,
    NotFound,
    TooManyRequests,
    Unavailable,
    hookimpl,
)
from dispatcher.plugin.authenticator import Authenticator, Identity
from pydantic import BaseModel
from tests.support.broken.providers import Unspeakable, forever, validating

CASES: dict[str, str] = {}
REFUSED: dict[str, str] = {}
_ATTRIBUTES: dict[str, str] = {}
RIGHT = "correct horse battery"


class Options(BaseModel):
    """No settings."""


class Good(Authenticator):
    """Knows alice."""

    Options = Options

    def authenticate(self, name: str, password: str, *, deadline: Any) -> Any:
        return Identity(user="alice") if (name, password) == ("alice", RIGHT) else None


class _Plugin:
    def __init__(self, hook: Callable[[], Any]) -> None:
        self._hook = hook

    @hookimpl
    def dispatcher_register_authenticators(self) -> Any:
        return self._hook()


def case(words: str, *, refused: bool = False) -> Callable[[type], type]:
    """Declare an authenticator as a plugin of its own, named after its class.

    :param words: of what the log and `/healthz` say; :param refused: there is no instance of it.
    """

    def add(cls: type) -> type:
        name = f"auth-{cls.__name__.lower().replace('_', '-')}"
        if "name" not in vars(cls):
            cls.name = name  # type: ignore[attr-defined]
        attribute = f"plugin_{name.replace('-', '_')}"
        globals()[attribute] = _Plugin(lambda: [cls])
        _ATTRIBUTES[name] = attribute
        (REFUSED if refused else CASES)[name] = words
        return cls

    return add


def entries() -> Iterator[tuple[str, str]]:
    """Yield the name and the attribute of each plugin."""
    yield from _ATTRIBUTES.items()


def returning(value: Any) -> type:
    """Return an authenticator that answers this."""
    return type("Returning", (Good,), {"authenticate": lambda *_arguments, **_named: value})


def raising(fault: Callable[[str], BaseException]) -> type:
    """Return an authenticator that raises what a function makes of the password."""

    def authenticate(_self: object, _name: str, password: str, *, deadline: Any) -> Any:
        raise fault(password)

    return type("Raising", (Good,), {"authenticate": authenticate})


# --- what it answers


@case("found a value of the type bool")
class Answers_False(returning(False)): ...


@case("found a value of the type bool")
class Answers_True(returning(True)): ...


@case("found a value of the type str")
class Answers_Text(returning("alice")): ...


@case("found a value of the type dict")
class Answers_Dict(returning({"user": "alice"})): ...


@case("found a value of the type coroutine")
class Answers_Later(Good):
    async def authenticate(self, name, password, *, deadline):
        return Identity(user=name)


@case("user is of the type NoneType")
class User_None(returning(Identity(user=None))): ...


@case("user is of the type bytes")
class User_Bytes(returning(Identity(user=b"alice"))): ...


@case("user is of the type int")
class User_Number(returning(Identity(user=7))): ...


@case("user is ''")
class User_Empty(returning(Identity(user=""))): ...


@case("user is '../../etc'")
class User_Path(returning(Identity(user="../../etc"))): ...


@case("user is")
class User_Surrogate(returning(Identity(user="a\udc80"))): ...


@case("user is")
class User_Huge(returning(Identity(user="a" * (20 << 20)))): ...


@case("user is")
class User_Line(returning(Identity(user="alice\nroot"))): ...


class OwnText(str):
    """A text with code of its own."""

    def __leave(self, *_arguments):
        raise SystemExit("code of a plugin")

    __str__ = __repr__ = __len__ = __getitem__ = encode = casefold = __leave


@case("user is '../../etc'")
class User_Of_Own_Type(returning(Identity(user=OwnText("../../etc")))): ...


@case("does not return")
class Hangs(Good):
    def authenticate(self, name, password, *, deadline):
        forever()


# --- what it raises


@case("SystemExit")
class Exits(raising(lambda _: SystemExit(3))): ...


@case("KeyboardInterrupt")
class Interrupts(raising(lambda _: KeyboardInterrupt())): ...


@case("CancelledError")
class Cancels(raising(lambda _: asyncio.CancelledError())): ...


@case("StopIteration")
class Stops(raising(lambda _: StopIteration())): ...


@case("RecursionError")
class Recurses(raising(lambda _: RecursionError("deep"))): ...


@case("Unspeakable")
class Unspeakable_Error(raising(lambda _: Unspeakable())): ...


@case("ValueError")
class Tells_Password(raising(lambda password: ValueError(f"bind failed for {password}"))): ...


@case("The directory is away")
class Away_With_Internals(
    raising(
        lambda password: Unavailable(
            "The directory is away", why=f"ldap://10.1.2.3 dn=cn=admin password={password}"
        )
    )
): ...


@case("The directory is away")
class Away_Why_Object(raising(lambda password: Unavailable("The directory is away", why=OSError(password)))): ...


@case("failed in authenticate")
class Away_Without_Text(raising(lambda _: Unavailable(None))): ...


@case("The directory is away")
class Away_For_Ever(raising(lambda _: Unavailable("The directory is away", retry_after="never"))): ...


@case("Locked")
class Forbids(raising(lambda _: Forbidden("Locked", why="the account alice exists and is locked"))): ...


@case("No such user")
class Not_Found(raising(lambda _: NotFound("No such user"))): ...


@case("Bad")
class Bad_Request(raising(lambda _: BadRequest("Bad", details={"self": object()}))): ...


@case("Slow down")
class Too_Many(raising(lambda _: TooManyRequests("Slow down"))): ...


@case("No more")
class Cancelled_Error(raising(lambda _: Cancelled("No more"))): ...


@case("Mine")
class Own_Status(raising(lambda _: type("Own", (DispatcherError,), {"status": "x", "code": None})("Mine"))): ...


# --- what cannot be made


@case("SystemExit: '4'", refused=True)
class Init_Exits(Good):
    def __init__(self, **_more):
        raise SystemExit(4)


@case("KeyboardInterrupt", refused=True)
class Init_Interrupts(Good):
    def __init__(self, **_more):
        raise KeyboardInterrupt


@case("does not return", refused=True)
class Init_Hangs(Good):
    def __init__(self, **_more):
        forever()


@case("calls itself 'local'", refused=True)
class Local(Good):
    name = "local"


@case("RuntimeError", refused=True)
class Options_Raise(Good):
    Options = validating(RuntimeError("no"))


@case("version 2", refused=True)
class Later(Good):
    api_version = 2
