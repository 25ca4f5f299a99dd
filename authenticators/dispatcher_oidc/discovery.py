"""The provider's configuration and keys, from the provider (OpenID Connect Discovery 1.0), kept for an hour."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from joserfc.errors import JoseError
from joserfc.jwk import JWKRegistry, Key

from dispatcher.plugin import Deadline, boottime
from dispatcher_oidc.http import Json, Provider
from dispatcher_oidc.options import OidcOptions, is_safe

FRESH = 3600.0  # seconds for which configuration and keys are used
AGAIN = 10.0  # seconds between two requests for the keys because of an unknown one
MAX_KEYS = 100
MIN_RSA = 2048  # bits


@dataclass(frozen=True, slots=True)
class Metadata:
    """The provider's configuration, as far as it is used."""

    authorization: str
    token: str
    jwks: str
    userinfo: str | None
    end_session: str | None
    sends_issuer: bool  # RFC 9207
    secret_in_body: bool


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that signs tokens."""

    kid: str | None
    alg: str | None
    key: Key


class Discovery:
    """Configuration and keys; used by many threads."""

    def __init__(self, options: OidcOptions, provider: Provider) -> None:
        self._options = options
        self._provider = provider
        self._lock = threading.Lock()
        self._metadata: tuple[float, Metadata] | None = None
        self._keys: tuple[float, list[PublicKey]] | None = None

    @property
    def url(self) -> str:
        """Where the configuration is."""
        return self._options.issuer.rstrip("/") + "/.well-known/openid-configuration"

    def forget(self) -> None:
        """Ask again at the next use."""
        with self._lock:
            self._metadata = self._keys = None

    def metadata(self, deadline: Deadline) -> Metadata:
        """Return the configuration.

        :raises Unavailable: it cannot be had, is incomplete, or of another issuer.
        """
        with self._holding(deadline):
            return self._read_metadata(deadline)

    def keys(self, deadline: Deadline, *, unknown: bool = False) -> list[PublicKey]:
        """Return the public keys.

        :param unknown: a token was signed by another key than those returned before: ask again, but not often.
        :raises Unavailable: they cannot be had.
        """
        with self._holding(deadline):
            age = AGAIN if unknown else FRESH
            if self._keys is None or boottime() - self._keys[0] > age:
                url = self._read_metadata(deadline).jwks
                found = _public_keys(self._provider.get(url, deadline))
                if not found:
                    raise self._provider.unusable(url, "it has no public key that can be used")
                self._keys = boottime(), found
            return self._keys[1]

    def _holding(self, deadline: Deadline) -> Any:
        return deadline.holding(
            self._lock, f"{self._options.shown} does not answer in time", why="other sign-ins wait for it, too"
        )

    def _read_metadata(self, deadline: Deadline) -> Metadata:
        if self._metadata is None or boottime() - self._metadata[0] > FRESH:
            self._metadata = boottime(), self._checked(self._provider.get(self.url, deadline))
        return self._metadata[1]

    def _checked(self, found: Json) -> Metadata:
        issuer = found.get("issuer")
        if issuer != self._options.issuer:
            named = repr(issuer)[:200]
            raise self._provider.unusable(self.url, f"its issuer is {named}, not {self._options.issuer!r}")

        def endpoint(name: str, *, required: bool) -> str | None:
            value = found.get(name)
            if value is None and not required:
                return None
            if not isinstance(value, str) or not is_safe(value):
                raise self._provider.unusable(self.url, f"{name} is missing, or no URL with https")
            return value

        methods = found.get("token_endpoint_auth_methods_supported")
        known = methods if isinstance(methods, list) else ["client_secret_basic"]
        return Metadata(
            authorization=str(endpoint("authorization_endpoint", required=True)),
            token=str(endpoint("token_endpoint", required=True)),
            jwks=str(endpoint("jwks_uri", required=True)),
            userinfo=endpoint("userinfo_endpoint", required=False),
            end_session=endpoint("end_session_endpoint", required=False),
            sends_issuer=found.get("authorization_response_iss_parameter_supported") is True,
            secret_in_body="client_secret_basic" not in known and "client_secret_post" in known,
        )


def _public_keys(found: Json) -> list[PublicKey]:
    """Return the keys for signatures; a key of an unknown kind is not an error (RFC 7517, section 5)."""
    entries = found.get("keys")
    keys = []
    for entry in entries[:MAX_KEYS] if isinstance(entries, list) else []:
        if not isinstance(entry, dict) or entry.get("kty") not in {"RSA", "EC", "OKP"}:
            continue
        operations = entry.get("key_ops")
        if entry.get("use", "sig") != "sig" or (isinstance(operations, list) and "verify" not in operations):
            continue
        shown = {name: entry[name] for name in ("kty", "n", "e", "crv", "x", "y") if name in entry}
        try:
            key = JWKRegistry.import_key(shown)
            size = getattr(key.public_key, "key_size", 0)
        except (JoseError, ValueError, TypeError, KeyError, AttributeError):
            continue
        if (entry["kty"] == "RSA" and size < MIN_RSA) or (entry["kty"] == "OKP" and not _signs(entry)):
            continue
        kid, alg = entry.get("kid"), entry.get("alg")
        keys.append(PublicKey(kid if isinstance(kid, str) else None, alg if isinstance(alg, str) else None, key))
    return keys


def _signs(entry: Json) -> bool:
    """Whether a key of the kind OKP is for signatures, not for agreements on keys (RFC 8037)."""
    return entry.get("crv") in ("Ed25519", "Ed448")
