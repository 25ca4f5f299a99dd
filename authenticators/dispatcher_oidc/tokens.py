"""Verification of ID tokens, logout tokens and signed user information.  No I/O: keys and time are passed in.

OpenID Connect Core 1.0, section 3.1.3.7, and Back-Channel Logout 1.0, section 2.6.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
from collections.abc import Sequence
from typing import Any

from joserfc.errors import JoseError
from joserfc.jws import JWSRegistry, deserialize_compact, extract_compact

from dispatcher_oidc.discovery import PublicKey
from dispatcher_oidc.http import Json

#: Signature algorithms by kind of key; no `none`, and none with a shared secret.
ALGORITHMS = {
    "RS256": "RSA", "RS384": "RSA", "RS512": "RSA", "PS256": "RSA", "PS384": "RSA", "PS512": "RSA",
    "ES256": "EC", "ES384": "EC", "ES512": "EC", "EdDSA": "OKP", "Ed25519": "OKP",
}  # fmt: skip
_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}
MAX_TOKEN = 64 * 1024  # characters
LOGOUT_EVENT = "http://schemas.openid.net/event/backchannel-logout"
LOGOUT_AGE = 300.0  # seconds after which a logout token is too old


class Invalid(Exception):
    """A token is not valid; the text says why."""


class UnknownKey(Invalid):
    """No key fits; there may be a new one."""


_REGISTRY = JWSRegistry(algorithms=list(ALGORITHMS), strict_check_header=False)
_REGISTRY.max_header_length = 8192


def verified(token: str, keys: Sequence[PublicKey]) -> tuple[Json, Json]:
    """Return header and claims of a token whose signature is right.

    :raises UnknownKey: it may be right with other keys; :raises Invalid: it is not.
    """
    if len(token) > MAX_TOKEN or not token.isascii():
        raise Invalid("it is too long, or not ASCII")
    if token.count(".") == 4:
        raise Invalid("it is encrypted")
    try:
        header = extract_compact(token.encode(), registry=_REGISTRY).headers()
    except (JoseError, ValueError, TypeError, RecursionError, AttributeError) as error:
        raise Invalid("it is not a signed JSON Web Token") from error
    if not isinstance(header, dict):
        raise Invalid("it is not a signed JSON Web Token")
    alg, kid = header.get("alg"), header.get("kid")
    if not isinstance(alg, str) or alg not in ALGORITHMS:
        raise Invalid(f"the algorithm of its signature is {str(alg)[:20]!r}, which is not accepted")
    fitting = [
        each
        for each in keys
        if each.key.key_type == ALGORITHMS[alg]
        and each.alg in {None, alg}
        and (alg not in _CURVES or getattr(each.key, "curve_name", None) == _CURVES[alg])
        and (kid is None or each.kid == kid)
    ]
    if not fitting:
        raise UnknownKey("it is signed with a key that the provider does not publish")
    for each in fitting:
        try:
            claims = json.loads(deserialize_compact(token, each.key, registry=_REGISTRY).payload)
        except (JoseError, ValueError, TypeError, RecursionError):
            continue
        if not isinstance(claims, dict):
            raise Invalid("it has no claims")
        return header, claims
    raise (UnknownKey if kid is None else Invalid)("its signature is wrong")


def check_id_token(
    header: Json,
    claims: Json,
    *,
    issuer: str,
    client_id: str,
    nonce: str,
    access_token: str | None,
    now: float,
    skew: float,
) -> None:
    """Check the claims of an ID token.

    :raises Invalid: one of them is wrong.
    """
    _check_common(claims, issuer, client_id, now, skew)
    expires = _time(claims, "exp")
    if expires is None or expires <= now - skew:
        raise Invalid("it has expired, or this machine's clock is wrong")
    if not _text(claims, "sub") or len(claims["sub"]) > 255:
        raise Invalid("its claim sub is missing or too long")
    sent = claims.get("nonce")
    if not isinstance(sent, str) or not hmac.compare_digest(sent.encode(errors="replace"), nonce.encode()):
        raise Invalid("it belongs to another sign-in (nonce)")
    if (
        "at_hash" in claims
        and access_token is not None
        and claims["at_hash"] != _half_hash(header["alg"], access_token)
    ):
        raise Invalid("it does not belong to the access token (at_hash)")


def check_user_information(claims: Json, *, issuer: str, client_id: str) -> None:
    """Check the claims of signed user information, in which `iss` and `aud` are optional (Core 1.0, 5.3.2).

    :raises Invalid: it says something else.
    """
    if "iss" in claims:
        _check_issuer(claims, issuer)
    if "aud" in claims:
        _check_audience(claims, client_id)


def check_logout_token(
    header: Json, claims: Json, *, issuer: str, client_id: str, now: float, skew: float
) -> float:
    """Check the claims of a logout token; return when it is too old, in Unix time.

    :raises Invalid: one of them is wrong.
    """
    _check_common(claims, issuer, client_id, now, skew)
    if str(header.get("typ", "")).lower() not in {"", "jwt", "logout+jwt"}:
        raise Invalid("it is of another type")
    events = claims.get("events")
    if not isinstance(events, dict) or not isinstance(events.get(LOGOUT_EVENT), dict):
        raise Invalid("it is not a logout token")
    if "nonce" in claims:
        raise Invalid("a logout token has no nonce")
    if not _text(claims, "jti"):
        raise Invalid("its claim jti is missing")
    if not _text(claims, "sub") and not _text(claims, "sid"):
        raise Invalid("it names neither a session nor a user")
    issued, expires = _time(claims, "iat"), _time(claims, "exp")
    assert issued is not None
    end = min(issued + LOGOUT_AGE, math.inf if expires is None else expires) + skew
    if end <= now:
        raise Invalid("it is too old")
    return end


def _check_issuer(claims: Json, issuer: str) -> None:
    if claims.get("iss") != issuer:
        raise Invalid(f"its issuer is {str(claims.get('iss'))[:200]!r}")


def _check_audience(claims: Json, client_id: str) -> list[Any]:
    """Return the audiences."""
    audience = claims.get("aud")
    audiences = [audience] if isinstance(audience, str) else audience
    if not isinstance(audiences, list) or client_id not in audiences:
        raise Invalid("it is for another client (aud)")
    return audiences


def _check_common(claims: Json, issuer: str, client_id: str, now: float, skew: float) -> None:
    _check_issuer(claims, issuer)
    audiences = _check_audience(claims, client_id)
    party = claims.get("azp")
    if (party is not None or len(audiences) > 1) and party != client_id:
        raise Invalid("it was issued to another client (azp)")
    issued, begin = _time(claims, "iat"), _time(claims, "nbf")
    if issued is None:
        raise Invalid("its claim iat is missing")
    if max(issued, begin or issued) > now + skew:
        raise Invalid("it is from the future, or this machine's clock is wrong")


def _time(claims: Json, name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if type(value) not in {int, float} or not 0 <= value < 1e12:
        raise Invalid(f"its claim {name} is not a time")
    return float(value)


def _text(claims: Json, name: str) -> str | None:
    value = claims.get(name)
    return value if isinstance(value, str) and value else None


def _half_hash(alg: str, token: str) -> str:
    """Return the left half of a token's hash (Core 1.0, section 3.1.3.6)."""
    name = {"256": "sha256", "384": "sha384"}.get(alg[-3:], "sha512")  # EdDSA with Ed25519: SHA-512
    digest = hashlib.new(name, token.encode()).digest()
    return base64.urlsafe_b64encode(digest[: len(digest) // 2]).rstrip(b"=").decode()
