"""Keep secrets out of logs, messages and printed configurations.  Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dispatcher.common.api_tokens import PREFIX

MASK = "********"

_KEY = re.compile(r"passw|secret|token|api_?key|private_?key", re.IGNORECASE)
_REQUEST_KEY = re.compile(r"authori[sz]ation|cookie|credential|stdin|nonce|\bdevice\b", re.IGNORECASE)
_API_TOKEN = re.compile(PREFIX + r"[A-Za-z0-9_-]{20,}")
_USERINFO = re.compile(r"(?<=://)([^\s/?#:@]*):[^\s/?#]*(?=@)")
_PAIR = re.compile(
    r"(\b(?:(?!passwords\b)\w*passw\w*|\w*token|\w*secret|authorization|code|nonce)\b[\"']?\s*[=:]\s*)"
    r"(?:bearer\s+|basic\s+)?(?:\"[^\"]*\"|'[^']*'|[^\s&;,\"']+)",
    re.IGNORECASE,
)


def is_secret(key: str) -> bool:
    """Whether a configuration key's value is a secret, by its name, and not the path of a file with one."""
    return bool(_KEY.search(key)) and not key.endswith(("_file", "_dir", "_path"))


def is_private(key: str) -> bool:
    """Whether a value must not be logged, by its name: secrets and what authenticates a request."""
    return bool(_KEY.search(key) or _REQUEST_KEY.search(key))


def url_passwords(text: str, mask: str = MASK) -> str:
    """Return `text` with the passwords in URLs masked."""
    return _USERINFO.sub(lambda match: f"{match[1]}:{mask}", text)


def text(text: str, mask: str = MASK) -> str:
    """Return `text` with API tokens, passwords in URLs, and the values of pairs such as ``token=...`` masked."""
    if PREFIX in text:
        text = _API_TOKEN.sub(PREFIX + mask, text)
    return _PAIR.sub(lambda match: f"{match[1]}{mask}", url_passwords(text, mask))


def configuration(data: Any, key: str = "") -> Any:
    """Return a configuration with secrets and the passwords in URLs masked."""
    if isinstance(data, Mapping):
        return {name: configuration(value, str(name)) for name, value in data.items()}
    if isinstance(data, list):
        return [configuration(value, key) for value in data]
    if isinstance(data, str) and data:
        return MASK if is_secret(key) else url_passwords(data)
    return data
