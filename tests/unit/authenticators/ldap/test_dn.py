"""Names of entries, and marks of disabled accounts, as different directories write them."""

from __future__ import annotations

import pytest

pytest.importorskip("ldap3", reason="ldap3 is not installed")

from dispatcher_ldap.authenticator import _is_disabled
from dispatcher_ldap.dn import first_values, is_dn


@pytest.mark.parametrize(
    ("dn", "values"),
    [
        ("uid=alice,ou=people,dc=example,dc=org", {"alice"}),
        ("UID=Alice", {"Alice"}),
        ("cn=x+uid=alice,uid=bob", {"alice"}),
        ("cn=x\\+uid=y,uid=bob", set()),
        (r"uid=a\,b\2Cc #1=2,dc=org", {"a,b,c #1=2"}),
        (r"uid=zo\C3\AB", {"zoë"}),
        (r"uid=\ a\ ,dc=org", {" a "}),
        ("uid=a+uid=b", {"a", "b"}),
        ("", set()),
    ],
)
def test_values_in_the_first_part_of_a_name(dn, values):
    assert first_values(dn, "uid") == values


def test_names_that_are_accepted_in_options():
    for dn in (
        "dc=org", "OU=R&D #2,DC=example,DC=org", "ou=a=b, dc=org", r"cn=Smith\, J\2C x+uid=y,dc=org",
        "2.5.4.3=x,dc=org", "ou=Zoë (x)",
    ):  # fmt: skip
        assert is_dn(dn), dn
    for text in (
        "",
        "people",
        "ou=",
        "ou=people,",
        ",dc=org",
        "ou=a;dc=org",
        'ou="a,b"',
        "ou=a\\",
        "ou=<a>",
        "o u=a",
    ):
        assert not is_dn(text), text


@pytest.mark.parametrize(
    ("values", "disabled"),
    [
        ({}, False),
        ({"pwdaccountlockedtime": [b"000001010000Z"]}, True),
        ({"pwdaccountlockedtime": [b"20261130120000Z"]}, False),
        ({"nsaccountlock": [b"TRUE"]}, True),
        ({"nsaccountlock": [b"false"]}, False),
        ({"logindisabled": [b"TRUE"]}, True),
        ({"useraccountcontrol": [b"512"]}, False),
        ({"useraccountcontrol": [b"514"]}, True),
        ({"useraccountcontrol": [b"66050"]}, True),
        ({"useraccountcontrol": [b"-1"]}, False),
    ],
)
def test_marks_of_disabled_accounts(values, disabled):
    assert _is_disabled(values) is disabled
