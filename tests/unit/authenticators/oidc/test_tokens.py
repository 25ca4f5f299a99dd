"""ID tokens and logout tokens: what is accepted, and each thing that is not."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time

import pytest

pytest.importorskip("joserfc", reason="joserfc is not installed")

from joserfc import jws
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey

from dispatcher_oidc import tokens
from dispatcher_oidc.discovery import PublicKey, _public_keys

ISSUER, CLIENT, NONCE = "https://login.example.org", "dispatcher", "the nonce"
NOW = 1_800_000_000.0
RSA, EC = RSAKey.generate_key(2048, {"kid": "rsa"}), ECKey.generate_key("P-256", {"kid": "ec"})
P384 = ECKey.generate_key("P-384", {"kid": "ec"})
KEYS = [PublicKey("rsa", None, RSA), PublicKey("ec", None, EC)]
GOOD = {"iss": ISSUER, "aud": CLIENT, "sub": "1234", "nonce": NONCE, "iat": NOW, "exp": NOW + 300}
LOGOUT = {
    "iss": ISSUER, "aud": CLIENT, "sub": "1234", "sid": "s", "iat": NOW, "exp": NOW + 120, "jti": "j",
    "events": {tokens.LOGOUT_EVENT: {}},
}  # fmt: skip


def signed(claims, key=RSA, alg="RS256", **header):
    payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    registry = jws.JWSRegistry(algorithms=[alg], strict_check_header=False)
    return jws.serialize_compact({"alg": alg, "kid": "rsa"} | header, payload, key, registry=registry)


def plain(*parts):
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts)


def check(claims, *, keys=KEYS, access_token=None, skew=60.0, now=NOW, token=None):
    header, found = tokens.verified(token or signed(claims), keys)
    tokens.check_id_token(
        header, found, issuer=ISSUER, client_id=CLIENT, nonce=NONCE, access_token=access_token, now=now, skew=skew
    )


def without(claims, name):
    return {key: value for key, value in claims.items() if key != name}


def test_a_good_token():
    check(GOOD)
    check(GOOD | {"aud": [CLIENT]})
    check(GOOD | {"aud": [CLIENT, "another"], "azp": CLIENT})
    check(GOOD, token=signed(GOOD, EC, "ES256", kid="ec"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"iss": ISSUER + "/"}, "issuer"),
        ({"iss": None}, "issuer"),
        ({"aud": "another"}, "aud"),
        ({"aud": [CLIENT, "another"]}, "azp"),
        ({"azp": "another"}, "azp"),
        ({"aud": {"dispatcher": 1}}, "aud"),
        ({"exp": NOW - 60}, "expired"),
        ({"exp": None}, "expired"),
        ({"exp": "tomorrow"}, "exp"),
        ({"exp": True}, "exp"),
        ({"iat": None}, "iat"),
        ({"iat": NOW + 61}, "future"),
        ({"nbf": NOW + 61}, "future"),
        ({"nonce": "another"}, "nonce"),
        ({"nonce": None}, "nonce"),
        ({"sub": ""}, "sub"),
        ({"sub": 1234}, "sub"),
        ({"sub": "x" * 256}, "sub"),
    ],
)
def test_a_wrong_claim_is_refused(change, why):
    with pytest.raises(tokens.Invalid, match=why):
        check(GOOD | change)


def test_clocks_may_differ_by_a_minute_and_no_more():
    check(GOOD | {"iat": NOW + 59, "exp": NOW - 59})
    for wrong in ({"iat": NOW + 61}, {"exp": NOW - 61}):
        with pytest.raises(tokens.Invalid, match="clock"):
            check(GOOD | wrong)
        check(GOOD | wrong, skew=120)


def test_the_access_token_must_be_the_one_that_came_with_it():
    half = hashlib.sha256(b"access").digest()[:16]
    claims = GOOD | {"at_hash": base64.urlsafe_b64encode(half).rstrip(b"=").decode()}
    check(claims, access_token="access")
    with pytest.raises(tokens.Invalid, match="at_hash"):
        check(claims, access_token="another")
    with pytest.raises(tokens.Invalid, match="at_hash"):
        check(GOOD | {"at_hash": None}, access_token="access")


def test_a_token_without_a_signature_is_refused():
    for alg in ("none", "None", "NONE", "nOnE"):
        for end in ("", "x"):
            with pytest.raises(tokens.Invalid, match="algorithm"):
                check(None, token=f"{plain({'alg': alg}, GOOD)}.{end}")
    with pytest.raises(tokens.Invalid):
        check(None, token=signed(GOOD).rpartition(".")[0] + ".")


def test_a_public_key_is_not_a_shared_secret():
    for key in (RSA.as_pem(private=False), json.dumps(RSA.as_dict(private=False)).encode(), b""):
        for alg in ("HS256", "HS384", "HS512"):
            text = plain({"alg": alg, "kid": "rsa"}, GOOD)
            mac = hmac.digest(key, text.encode(), f"sha{alg[2:]}")
            with pytest.raises(tokens.Invalid, match="algorithm"):
                check(None, token=f"{text}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}")
    assert _public_keys({"keys": [OctKey.import_key(b"a shared secret").as_dict(private=True)]}) == []


def test_a_signature_by_another_key_is_refused():
    other = RSAKey.generate_key(2048)
    with pytest.raises(tokens.Invalid, match="signature"):
        check(None, token=signed(GOOD, other))
    with pytest.raises(tokens.UnknownKey):
        check(None, token=signed(GOOD, other, kid="new"))
    head, _, end = signed(GOOD).split(".")
    with pytest.raises(tokens.Invalid, match="signature"):
        check(None, token=f"{head}.{plain(GOOD | {'sub': 'other'})}.{end}")
    # A key in the header proves nothing.
    with pytest.raises(tokens.Invalid, match="signature"):
        check(None, token=signed(GOOD, other, jwk=other.as_dict(private=False)))


def test_a_token_without_the_name_of_its_key_is_tried_with_each():
    check(None, token=jws.serialize_compact({"alg": "RS256"}, json.dumps(GOOD), RSA))
    with pytest.raises(tokens.UnknownKey):
        check(None, token=jws.serialize_compact({"alg": "RS256"}, json.dumps(GOOD), RSAKey.generate_key(2048)))


def test_key_and_algorithm_must_fit():
    ps256 = [PublicKey("rsa", "PS256", RSA)]
    with pytest.raises(tokens.UnknownKey):
        check(GOOD, keys=ps256)
    check(None, keys=ps256, token=signed(GOOD, RSA, "PS256"))
    with pytest.raises(tokens.UnknownKey):  # ES256 is for P-256
        check(None, keys=[PublicKey("ec", None, P384)], token=signed(GOOD, EC, "ES256", kid="ec"))


@pytest.mark.parametrize(
    "token",
    [
        "", ".", "..", "a.b.c", "é.é.é", plain({"alg": "RS256"}), f"{plain(['RS256'], GOOD)}.x", "x" * 70_000,
        f"{plain({'alg': ['RS256']}, GOOD)}.x", f"{plain({'alg': 5}, GOOD)}.x", "a.b.c.d.e", f"{plain('alg', GOOD)}.x",
    ],
)  # fmt: skip
def test_what_is_no_token_is_refused(token):
    with pytest.raises(tokens.Invalid):
        tokens.verified(token, KEYS)


def test_claims_must_be_an_object_and_critical_headers_known():
    for payload in (b"[]", b"{", b'"x"', b"[" * 20_000, b"\xff"):
        with pytest.raises(tokens.Invalid):
            check(None, token=signed(payload))
    head = {"alg": "RS256", "kid": "rsa", "crit": ["exp"], "exp": 1}
    begin = plain(head, GOOD)
    signature = signed(GOOD).rpartition(".")[2]
    with pytest.raises(tokens.Invalid):
        check(None, token=f"{begin}.{signature}")


def check_logout(claims, now=NOW, **header):
    found_header, found = tokens.verified(signed(claims, **header), KEYS)
    return tokens.check_logout_token(found_header, found, issuer=ISSUER, client_id=CLIENT, now=now, skew=60.0)


def test_signed_user_information_need_not_say_for_whom_it_is_and_must_not_be_for_others():
    good = {"sub": "1", "iss": ISSUER, "aud": [CLIENT, "other"]}
    for claims in (good, {"sub": "1"}, good | {"aud": CLIENT}):
        tokens.check_user_information(claims, issuer=ISSUER, client_id=CLIENT)
    for wrong in ({"iss": "https://other.example.org"}, {"aud": "other"}, {"aud": None}, {"iss": None}):
        with pytest.raises(tokens.Invalid):
            tokens.check_user_information(good | wrong, issuer=ISSUER, client_id=CLIENT)


def test_a_good_logout_token():
    assert check_logout(LOGOUT) == NOW + 120 + 60
    assert check_logout(without(LOGOUT, "exp"), typ="logout+jwt") == NOW + 300 + 60
    check_logout(without(LOGOUT, "sid"))
    check_logout(without(LOGOUT, "sub"))


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        (GOOD, "logout token"),
        (LOGOUT | {"nonce": NONCE}, "nonce"),
        (LOGOUT | {"nonce": None}, "nonce"),
        (without(LOGOUT, "jti"), "jti"),
        (without(without(LOGOUT, "sid"), "sub"), "neither"),
        (LOGOUT | {"events": [tokens.LOGOUT_EVENT]}, "logout token"),
        (LOGOUT | {"events": {tokens.LOGOUT_EVENT: True}}, "logout token"),
        (LOGOUT | {"iss": "https://other.example.org"}, "issuer"),
        (LOGOUT | {"aud": "another"}, "aud"),
        (LOGOUT | {"iat": NOW - 400, "exp": NOW + 400}, "old"),
        (LOGOUT | {"exp": NOW - 61}, "old"),
        (LOGOUT | {"iat": NOW + 61}, "future"),
        (without(LOGOUT, "iat"), "iat"),
    ],
)
def test_a_wrong_logout_token_is_refused(claims, why):
    with pytest.raises(tokens.Invalid, match=why):
        check_logout(claims)


def test_a_token_of_another_type_is_no_logout_token():
    with pytest.raises(tokens.Invalid, match="type"):
        check_logout(LOGOUT, typ="at+jwt")


def test_a_logout_token_signs_nobody_in():
    with pytest.raises(tokens.Invalid):
        check(LOGOUT)


@pytest.mark.filterwarnings("ignore")
def test_keys_for_other_uses_and_weak_ones_are_left_out():
    rsa = RSA.as_dict(private=False)
    good = [rsa, EC.as_dict(private=False), OKPKey.generate_key("Ed25519").as_dict(private=False)]
    bad = [
        rsa | {"use": "enc"}, rsa | {"key_ops": ["sign"]}, RSAKey.generate_key(1024).as_dict(private=False), "x", {},
        {"kty": "RSA"}, {"kty": "RSA", "n": 5, "e": []}, {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}, {"kty": "new"},
        OKPKey.generate_key("X25519").as_dict(private=False),
    ]  # fmt: skip
    assert len(_public_keys({"keys": [*bad, *good]})) == len(good)
    assert _public_keys({"keys": 5}) == _public_keys({}) == []


def test_the_check_costs_little():
    token, begin = signed(GOOD), time.monotonic()
    for _ in range(100):
        check(None, token=token)
    assert time.monotonic() - begin < 5
