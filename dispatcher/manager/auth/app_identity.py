"""Signed statements for apps about their user: JSON Web Tokens (RFC 7519), signed with ES256 (RFC 7518, 3.4).

The edge adds them to each request for an app with ``identity = true``.  The app can verify them with the public
keys at the portal; the private key never leaves the manager.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dispatcher.common.log import logger
from dispatcher.manager.files.manager_dirs import write_atomically
from dispatcher.plugin.errors import Unavailable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

KEY = "app-identity.key"
LIFETIME = 600.0  # seconds for which a statement is valid
RENEWAL = 240.0  # seconds after which the edge gets a new one
MAX_HEADER = 6000  # bytes of a statement: servers take 8 KiB for all header fields at least

_log = logger("manager.identity")


class _Made(NamedTuple):
    claims: tuple[Any, ...]
    time: float
    text: str


class AppIdentity:
    """Makes the statements, and keeps each for `RENEWAL` seconds.

    :param directory: of the private key, which is made when it is first needed.
    :param issuer: returns the URL of the portal, "" if `proxy.public_url` is not set.
    :param clock: returns Unix time.
    """

    def __init__(self, directory: Path, issuer: Callable[[], str], clock: Callable[[], float] = time.time) -> None:
        self._path = directory / KEY
        self._issuer = issuer
        self._clock = clock
        self._lock = threading.Lock()
        self._key: EllipticCurvePrivateKey | None = None
        self._id = ""
        self._made: dict[str, _Made] = {}

    def statement(self, *, user: str, groups: Collection[str], app: str, agent: str) -> str:
        """Return the statement for an agent: a JWT in compact form.

        Its claims: ``iss`` (the portal), ``sub`` (the user), ``aud`` (the app), ``agent``, ``groups``, ``iat`` and
        ``exp``.

        :raises Unavailable: the private key cannot be read or made.
        """
        now, claims = self._clock(), (self._issuer(), user, tuple(sorted(groups)), app)
        with self._lock:
            made = self._made.get(agent)
            if made is None or made.claims != claims or not 0 <= now - made.time < RENEWAL:
                made = self._made[agent] = _Made(claims, now, self._sign(agent, claims, now))
            return made.text

    def forget(self, agent: str) -> None:
        """Forget a removed agent."""
        with self._lock:
            self._made.pop(agent, None)

    def keys(self) -> dict[str, Any]:
        """Return the public keys as a JWK Set (RFC 7517).

        :raises Unavailable: as `statement`.
        """
        with self._lock:
            key = _members(self._private())
        return {"keys": [{**key, "use": "sig", "alg": "ES256", "kid": self._id}]}

    def _sign(self, agent: str, claims: tuple[Any, ...], now: float) -> str:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

        issuer, user, groups, app = claims
        key = self._private()
        body = {"iss": issuer, "sub": user, "aud": app, "agent": agent, "groups": list(groups)}
        if not issuer:
            del body["iss"]
        body |= {"iat": int(now), "exp": int(now + LIFETIME)}
        signed = f"{_json({'alg': 'ES256', 'typ': 'JWT', 'kid': self._id})}.{_json(body)}"
        if len(signed) > MAX_HEADER:
            body |= {"groups": [], "groups_omitted": True}
            signed = f"{_json({'alg': 'ES256', 'typ': 'JWT', 'kid': self._id})}.{_json(body)}"
        r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_encoded(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def _private(self) -> EllipticCurvePrivateKey:
        if self._key is None:
            # Imported here: it is slow, and most installations do without.
            from cryptography.hazmat.primitives import serialization
            from cryptography.hazmat.primitives.asymmetric import ec

            try:
                if not self._path.exists():
                    made = ec.generate_private_key(ec.SECP256R1())
                    pem = made.private_bytes(
                        serialization.Encoding.PEM,
                        serialization.PrivateFormat.PKCS8,
                        serialization.NoEncryption(),
                    )
                    write_atomically(self._path, pem, 0o600)
                    _log.info("made a key for statements to apps", path=str(self._path))
                key = serialization.load_pem_private_key(self._path.read_bytes(), None)
                if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
                    raise ValueError("it is not a key for ES256")
            except (OSError, ValueError, TypeError) as error:
                raise Unavailable(
                    f"The key {self._path} cannot be used", why=str(error), fix="delete it: a new one is made"
                ) from error
            thumbprint = json.dumps(_members(key), separators=(",", ":")).encode()  # RFC 7638
            self._id = _encoded(hashlib.sha256(thumbprint).digest())
            self._key = key
        return self._key


def _members(key: EllipticCurvePrivateKey) -> dict[str, str]:
    """Return the public key as a JWK, in alphabetical order."""
    numbers = key.public_key().public_numbers()
    x, y = (_encoded(number.to_bytes(32, "big")) for number in (numbers.x, numbers.y))
    return {"crv": "P-256", "kty": "EC", "x": x, "y": y}


def _json(value: object) -> str:
    return _encoded(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def _encoded(data: bytes) -> str:
    """Return base64url without padding (RFC 7515, section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
