"""From claims to a user, and who may sign in."""

from __future__ import annotations

import pytest

pytest.importorskip("joserfc", reason="joserfc is not installed")

from dispatcher_oidc import claims
from dispatcher_oidc.options import OidcOptions

CLAIMS = {
    "sub": "1", "preferred_username": "Alice", "email": "alice@example.org", "email_verified": True, "groups": ["staff", "makers"],
    "realm_access": {"roles": ["user"]}, "https://example.org/groups": ["dotted"],
}  # fmt: skip


def options(**values):
    return OidcOptions(issuer="https://login.example.org", client_id="x", **values)


def test_the_name():
    assert claims.user(CLAIMS, options()) == "Alice"
    assert claims.user(CLAIMS, options(username_claim="email")) == "alice@example.org"
    assert claims.user(CLAIMS, options(username_claim="email", strip_domain="Example.org")) == "alice"
    assert claims.user(CLAIMS, options(username_claim="sub")) == "1"


@pytest.mark.parametrize(
    "value",
    ["alice@example.org.evil.example", "alice@other.org", "@example.org", "example.org", "a@b@example.org.x"],
)
def test_only_the_one_domain_is_left_out(value):
    assert claims.user({"upn": value}, options(username_claim="upn", strip_domain="example.org")) == value


@pytest.mark.parametrize("verified", [False, None, "false", 1.5, [True], "yes"])
def test_an_address_counts_only_when_it_is_verified(verified):
    with pytest.raises(claims.Refused, match="not verified"):
        claims.user(CLAIMS | {"email_verified": verified}, options(username_claim="email"))


@pytest.mark.parametrize("value", [None, "", 5, ["alice"], {}])
def test_without_a_name_nobody_signs_in(value):
    with pytest.raises(claims.Refused, match="preferred_username"):
        claims.user({"preferred_username": value}, options())


def test_groups():
    assert claims.groups(CLAIMS, options()) == frozenset()
    assert claims.groups(CLAIMS, options(groups_claim="groups")) == {"staff", "makers"}
    assert claims.groups(CLAIMS, options(groups_claim="realm_access.roles")) == {"user"}
    assert claims.groups(CLAIMS, options(groups_claim="https://example.org/groups")) == {"dotted"}
    assert claims.groups({"groups": "staff"}, options(groups_claim="groups")) == {"staff"}
    assert claims.groups({"groups": ["a", 5, "", None, "x" * 300, "b\0"]}, options(groups_claim="groups")) == {"a"}
    assert claims.groups({"groups": {"staff": True}}, options(groups_claim="groups.x.y")) == frozenset()


def test_allowed_groups_are_whole_names():
    allowed = options(groups_claim="groups", allow_groups=["staff", "admins"])
    assert claims.groups({"groups": ["staff"]}, allowed) == {"staff"}
    for groups in (["staff2"], ["sta"], ["Staff"], "staff2", "staff admins", [["staff"]], [], None, "not staff"):
        with pytest.raises(claims.Refused, match="allow_groups"):
            claims.groups({"groups": groups}, allowed)
    with pytest.raises(claims.Refused, match="groups_claim"):
        claims.groups({}, allowed)


def test_too_many_groups_are_refused_rather_than_cut():
    with pytest.raises(claims.Refused, match="more than 1000"):
        claims.groups({"groups": [str(number) for number in range(1001)]}, options(groups_claim="groups"))


@pytest.mark.parametrize(
    "claims_", [{"_claim_names": {"groups": "src1"}}, {"hasgroups": True}, {"hasgroups": "true"}]
)
@pytest.mark.parametrize("allowed", [[], ["staff"]])
def test_groups_that_are_elsewhere_are_not_no_groups(claims_, allowed):
    """Entra ID leaves out the groups of a user who has more than 200."""
    wanted = options(groups_claim="groups", allow_groups=allowed)
    with pytest.raises(claims.Refused, match="more groups than the provider sends"):
        claims.groups(claims_, wanted)
    assert claims.groups(claims_ | {"groups": ["staff"]}, wanted) == {"staff"}
    assert claims.groups(claims_ | {"roles": ["staff"]}, options(groups_claim="roles")) == {"staff"}
    assert claims.groups(claims_, options()) == frozenset()


def test_required_claims():
    flag = options(require={"email_verified": True})
    claims.check_required({"email_verified": True}, flag)
    for value in (False, "true", 1, None):
        with pytest.raises(claims.Refused, match="email_verified"):
            claims.check_required({"email_verified": value}, flag)
    wanted = options(require={"hd": "example.org"})
    claims.check_required({"hd": "example.org"}, wanted)
    claims.check_required({"hd": ["other", "example.org"]}, wanted)
    for value in (None, "other.org", "example.org.evil", True, ["other"]):
        with pytest.raises(claims.Refused, match="hd"):
            claims.check_required({"hd": value}, wanted)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"issuer": "http://login.example.org"}, "issuer"),
        ({"issuer": "https://login.example.org/?x=1"}, "issuer"),
        ({"issuer": "https://user@login.example.org"}, "issuer"),
        ({"issuer": "http://127.0.0.1.example.org"}, "issuer"),
        ({"issuer": "login.example.org"}, "issuer"),
        ({"allow_groups": ["staff"]}, "groups_claim"),
        ({"parameters": {"redirect_uri": "https://evil.example"}}, "redirect_uri"),
        ({"strip_domain": "@example.org"}, "domain"),
        ({"client_id": ""}, "client_id"),
        ({"clock_skew": "1h"}, "clock_skew"),
        ({"client_secret": "hunter2"}, "client_secret"),
    ],
)
def test_wrong_options_are_refused(values, told):
    with pytest.raises(ValueError, match=told):
        OidcOptions(**{"issuer": "https://login.example.org", "client_id": "x"} | values)


def test_an_issuer_on_this_machine_needs_no_encryption():
    for issuer in (
        "http://localhost:8080/realms/x",
        "http://127.0.0.1:1",
        "http://[::1]:5",
        "https://login.example.org/",
    ):
        assert OidcOptions(issuer=issuer, client_id="x").issuer == issuer


def test_the_address_of_the_portal_must_be_known():
    import dispatcher_oidc
    from dispatcher.config.load import parse
    from dispatcher.config.plugins import Plugins
    from dispatcher.plugin import ConfigError

    plugins = Plugins([])
    plugins.register("oidc", dispatcher_oidc)
    table = {"issuer": "https://login.example.org", "client_id": "x"}
    auth = {"authenticator": "oidc.corp", "oidc": {"corp": table}}
    with pytest.raises(
        ConfigError, match=r"proxy\.public_url: is missing, the authenticator 'oidc\.corp' requires it"
    ):
        parse({"auth": auth}).authenticator_options("oidc.corp", plugins)
    found = parse({"auth": auth, "proxy": {"public_url": "https://apps.example.org"}})
    assert found.authenticator_options("oidc.corp", plugins).issuer == table["issuer"]
    with pytest.raises(ConfigError, match=r"auth\.oidc\.NAME"):
        found.authenticator_options("oidc", plugins)
