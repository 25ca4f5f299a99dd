"""API tokens in the field Authorization (RFC 6750, 2.1): a token of the dispatcher never reaches an app.

Other values of the field belong to the app.  Whatever looks like a token of the dispatcher and is not exactly one
is refused.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from dispatcher.common.api_tokens import PREFIX
from dispatcher.proxy.edge.http.field_names import BadHead

_PREFIX: Final = PREFIX.encode()
#: At the beginning of a credential: an app's own may have these letters inside.
_CLAIM: Final = re.compile(rb"(?:^|[^A-Za-z0-9._~+/-])" + _PREFIX)
_BEARER: Final = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +(" + _PREFIX + rb"[A-Za-z0-9_-]{43})")
#: In place of a digest: no token has this one.
INVALID: Final = b"invalid"


def read_bearer(value: bytes) -> bytes:
    """Return the SHA-256 of the API token in an Authorization field, empty if the field is the app's.

    :param value: several fields are joined by commas.
    :return: `INVALID` for a token that cannot be one.
    :raises BadHead: a token, and another credential.
    """
    if value.find(_PREFIX) < 0 or not _CLAIM.search(value):
        return b""
    if value.find(b",") >= 0:
        raise BadHead("an API token beside another Authorization")
    match = _BEARER.fullmatch(value)
    return hashlib.sha256(match[1]).digest() if match else INVALID
