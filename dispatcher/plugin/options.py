"""Types for the configuration and for the options of plugins: tables, durations, sizes, addresses."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from dispatcher.plugin.errors import ConfigError
from dispatcher.plugin.names import printable

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_HOST = re.compile(r"[A-Za-z0-9._-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Table(BaseModel):
    """A table of the configuration: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def duration(value: object) -> float:
    """Return seconds for ``"30m"``, ``"1h30m"``, ``"500ms"`` or a number of seconds.

    :raises ValueError: not a duration, or negative.
    """
    expected = 'a duration such as "90s", "30m" or "1h30m"'
    if isinstance(value, str):
        parts = _DURATION.findall(value)
        if not parts or _DURATION.sub("", value).strip():
            raise ValueError(expected)
        return sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(expected)
    return float(value)


def size(value: object) -> int:
    """Return bytes for ``"512M"``, ``"1.5G"`` or a number of bytes.  Powers of 1024.

    :raises ValueError: not a size, or not above zero.
    """
    expected = 'a size such as "512M" or "2G"'
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if not match:
            raise ValueError(expected)
        value = int(float(match[1]) * _FACTORS[match[2].upper()])
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(expected)
    return value


def address(value: str) -> str:
    """Return where to listen: ``HOST:PORT``, ``[IPv6]:PORT``, ``unix:/PATH`` or ``systemd``.

    :raises ValueError: another form.
    """
    if value == "systemd" or (value.startswith("unix:/") and "\0" not in value):
        return value
    host, _, port = value.rpartition(":")
    if re.fullmatch(r"\d{1,5}", port) and int(port) < 65536:
        if _HOST.fullmatch(host):
            return value
        with contextlib.suppress(ValueError):
            ipaddress.IPv6Address(host[1:-1].partition("%")[0])
            if (host[0], host[-1]) == ("[", "]"):
                return value
    raise ValueError("an address such as 127.0.0.1:8080, [::1]:8080, unix:/PATH or systemd")


def takes_ipv4(address: str, beside: Iterable[str]) -> bool:
    """Whether a listener takes IPv4 beside IPv6: ``[::]:PORT`` does, unless ``0.0.0.0:PORT`` has one of its own.

    :param beside: all addresses of the list that it is from.
    """
    port = address.removeprefix("[::]:")
    return port != address and f"0.0.0.0:{port}" not in beside


def matching(pattern: str, expected: str) -> Callable[[str], str]:
    """Return a check of text that a regular expression matches as a whole; its error is `expected`."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(expected)
        return value

    return check


def network(value: str) -> str:
    """Return a network such as ``10.0.0.0/8``, an address, or ``unix`` for peers on Unix sockets.

    :raises ValueError: another form.
    """
    try:
        if value != "unix":
            ipaddress.ip_network(value, strict=False)
    except ValueError as error:
        raise ValueError("a network such as 10.0.0.0/8, an address, or unix") from error
    return value


def ip_networks(value: list[str]) -> list[str]:
    """Return networks such as ``10.0.0.0/8``.

    :raises ValueError: another form.
    """
    try:
        for one in value:
            ipaddress.ip_network(one)
    except ValueError as error:
        raise ValueError("a network such as 10.0.0.0/8") from error
    return value


def origin(value: str) -> str:
    """Return ``http://HOST[:PORT]`` or ``https://HOST[:PORT]`` (or nothing), without a slash at the end.

    :raises ValueError: not an origin.
    """
    expected = "an address such as https://apps.example.org, without a path"
    if not value:
        return value
    try:
        parts = urlsplit(value)
        good = parts.port is None or parts.port > 0
    except ValueError as error:
        raise ValueError(expected) from error
    plain = parts.path in {"", "/"} and not parts.query and not parts.fragment and parts.username is None
    if not (good and plain and parts.scheme in {"http", "https"} and parts.hostname) or re.search(r"\s", value):
        raise ValueError(expected)
    return value.rstrip("/")


url_path = matching("/[!-~]*", "a path that begins with /")
variable = matching(_VARIABLE.pattern, "the name of a variable")


def _can_be_variable(name: str, content: str) -> bool:
    return bool(_VARIABLE.fullmatch(name)) and "\0" not in content


def variables(value: dict[str, str]) -> dict[str, str]:
    """Return environment variables.

    :raises ValueError: a name that is not of letters, digits and _, or a NUL in a value.
    """
    if not all(itertools.starmap(_can_be_variable, value.items())):
        raise ValueError("names of letters, digits and _, and values without NUL")
    return value


def check_environment(app: str, environment: Mapping[str, str]) -> None:
    """Check the whole environment that an agent of `app` is to get, the provider's own variables included.

    :raises ConfigError: something in it cannot be a variable.
    """
    for name, content in environment.items():
        if not _can_be_variable(name, content):
            raise ConfigError(
                f"apps.{app}.environment: {printable(name)} cannot be a variable",
                why="a name has letters, digits and _ and does not begin with a digit; a value holds no NUL",
            )


def absolute_path(value: Path) -> Path:
    """Return a path that is one from everywhere, and can be written into a command or a file.

    :raises ValueError: it is relative, goes up again, or holds control characters.
    """
    if not value.is_absolute() or ".." in value.parts or not str(value).isprintable():
        raise ValueError("an absolute path without .. and control characters")
    return value


def _port_range(value: tuple[int, int]) -> tuple[int, int]:
    if not 1024 <= value[0] <= value[1] <= 65535:
        raise ValueError("two ports from 1024 to 65535, the lower one first")
    return value


def _uid_range(value: tuple[int, int]) -> tuple[int, int]:
    if not 1000 <= value[0] < value[1] < 2**32 - 1:
        raise ValueError("two user ids from 1000 on, the lower one first")
    return value


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _duration_or_never(value: Any) -> Any:
    return value if value is False else duration(value)


def _size_or_unlimited(value: Any) -> Any:
    return value if value is False else size(value)


def _count_or_unlimited(value: Any) -> Any:
    if value is not False and (type(value) is not int or value < 1):
        raise ValueError("a whole number of at least 1, or false")
    return value


def _number_or_unlimited(value: Any) -> Any:
    if value is not False and (type(value) not in {int, float} or not 0 < value < math.inf):
        raise ValueError("a number above 0, or false")
    return value


Count = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
#: Seconds.
Duration = Annotated[float, BeforeValidator(duration)]
#: A duration, or false for *never*.
MaybeDuration = Annotated[float | Literal[False], BeforeValidator(_duration_or_never)]
#: Bytes.
Size = Annotated[int, BeforeValidator(size)]
#: An upper bound, or false for *unlimited*: bytes, a whole number, a number.
MaybeSize = Annotated[int | Literal[False], BeforeValidator(_size_or_unlimited)]
MaybeCount = Annotated[int | Literal[False], BeforeValidator(_count_or_unlimited)]
MaybeNumber = Annotated[float | Literal[False], BeforeValidator(_number_or_unlimited)]
Address = Annotated[str, AfterValidator(address)]
NetworkAddress = Annotated[str, AfterValidator(network)]
#: One address, or a list of them.
Addresses = Annotated[list[Address], BeforeValidator(_one_or_more)]
NetworkAddresses = Annotated[list[NetworkAddress], BeforeValidator(_one_or_more)]
IpNetworks = Annotated[list[str], AfterValidator(ip_networks)]
Origin = Annotated[str, AfterValidator(origin)]
UrlPath = Annotated[str, AfterValidator(url_path)]
Environment = Annotated[dict[str, str], AfterValidator(variables)]
Variable = Annotated[str, AfterValidator(variable)]
Argument = Annotated[str, AfterValidator(matching(r"[^\0]*", "text without NUL"))]
AbsolutePath = Annotated[Path, AfterValidator(absolute_path)]
PortRange = Annotated[tuple[Count, Count], AfterValidator(_port_range)]
UidRange = Annotated[tuple[Count, Count], AfterValidator(_uid_range)]
