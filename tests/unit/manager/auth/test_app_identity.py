"""Statements for apps about their user: claims, signature, renewal, the key."""

from __future__ import annotations

import base64
import json

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from dispatcher.manager.auth import app_identity
from dispatcher.manager.auth.app_identity import AppIdentity
from dispatcher.plugin.errors import Unavailable

ALICE = {"user": "alice", "groups": {"staff", "b"}, "app": "lab", "agent": "alice:lab"}


def decoded(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def verified(statement, keys):
    """Return the claims of a statement, as a library of an app would (RFC 7515, 5.2)."""
    header, body, signature = statement.split(".")
    head = json.loads(decoded(header))
    [key] = [key for key in keys["keys"] if key["kid"] == head["kid"]]
    assert head["alg"] == key["alg"] == "ES256"
    x, y = (int.from_bytes(decoded(key[name]), "big") for name in "xy")
    public = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    raw = decoded(signature)
    assert len(raw) == 64
    r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
    public.verify(encode_dss_signature(r, s), f"{header}.{body}".encode(), ec.ECDSA(hashes.SHA256()))
    return json.loads(decoded(body))


@pytest.fixture
def now():
    return [1_800_000_000.5]


@pytest.fixture
def identity(tmp_path, now):
    return AppIdentity(tmp_path, lambda: "https://apps.example.org/auth", lambda: now[0])


def test_a_statement_is_verified_with_the_keys_of_the_portal(identity, tmp_path):
    assert verified(identity.statement(**ALICE), identity.keys()) == {
        "iss": "https://apps.example.org/auth",
        "sub": "alice",
        "aud": "lab",
        "agent": "alice:lab",
        "groups": ["b", "staff"],
        "iat": 1_800_000_000,
        "exp": 1_800_000_600,
    }
    other = AppIdentity(tmp_path, lambda: "")
    assert other.keys() == identity.keys(), "the key is kept"
    assert (tmp_path / app_identity.KEY).stat().st_mode & 0o777 == 0o600
    assert "iss" not in verified(other.statement(**ALICE), identity.keys())


def test_a_changed_statement_is_not_valid(identity):
    header, _, signature = identity.statement(**ALICE).split(".")
    body = base64.urlsafe_b64encode(b'{"sub":"root"}').decode().rstrip("=")
    with pytest.raises(InvalidSignature):
        verified(f"{header}.{body}.{signature}", identity.keys())


def test_a_statement_is_renewed_well_before_it_ends_and_when_it_is_not_true_any_more(identity, now):
    first = identity.statement(**ALICE)
    now[0] += 200
    assert identity.statement(**ALICE) == first
    now[0] += 60
    second = identity.statement(**ALICE)
    assert verified(second, identity.keys())["exp"] == int(now[0]) + 600
    assert verified(identity.statement(**ALICE | {"groups": ()}), identity.keys())["groups"] == []
    now[0] -= 3600  # the clock was set back
    assert verified(identity.statement(**ALICE), identity.keys())["iat"] == int(now[0])


def test_too_many_groups_for_a_header_field_are_left_out_and_that_is_said(identity):
    claims = verified(
        identity.statement(**ALICE | {"groups": {f"group {n}" for n in range(1000)}}), identity.keys()
    )
    assert (claims["groups"], claims["groups_omitted"]) == ([], True)


def test_a_broken_key_is_named(identity, tmp_path):
    (tmp_path / app_identity.KEY).write_text("no key")
    with pytest.raises(Unavailable, match=r"app-identity\.key cannot be used"):
        identity.statement(**ALICE)
