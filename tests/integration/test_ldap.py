"""The authenticator `ldap` with a real OpenLDAP server: certificates, groups, names, faults, fail-over."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dispatcher.plugin import Deadline, Forbidden, NotFound, Unavailable, Unsupported
from tests.support import slapd
from tests.support.certificates import Authority
from tests.support.edge_daemon import free_port
from tests.support.manager_process import client_of, manager_in
from tests.support.slapd import ADMIN, ADMIN_PASSWORD, GROUP_BASE, PEOPLE_BASE, Slapd

pytestmark = [pytest.mark.program("slapd", "ldapmodify"), pytest.mark.xdist_group("ldap")]
PASSWORD = slapd.PEOPLE["alice"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Slapd(tmp_path_factory.mktemp("slapd")) as running:
        yield running


@pytest.fixture
def ldap(server, tmp_path):
    """Make an authenticator; the administrator's account searches."""
    from dispatcher_ldap.authenticator import LdapAuthenticator

    secret = tmp_path / "password"
    secret.write_text(ADMIN_PASSWORD)

    def make(of=server, **options):
        found = {"user_base": PEOPLE_BASE} if "user_dn" not in options else {}
        account = {"bind_dn": ADMIN, "bind_password_file": secret}
        values = {"servers": [of.tls_url], "ca_file": of.authority.path, **found, **account, **options}
        return LdapAuthenticator(options=LdapAuthenticator.Options(**values))

    return make


def sign_in(authenticator, name="alice", password=PASSWORD, seconds=20):
    found = authenticator.authenticate(name, password, deadline=Deadline(seconds))
    return found.user if found else None


def why_not(authenticator, *arguments):
    with pytest.raises(Unavailable) as caught:
        sign_in(authenticator, *arguments)
    return str(caught.value)


def test_a_certificate_that_is_not_right_is_refused_and_the_reason_told(ldap, server, tmp_path):
    other = Authority(tmp_path, "another authority")
    for url in (server.url, server.tls_url):
        refused = why_not(ldap(servers=[url], ca_file=other.path))
        assert "certificate verify failed" in refused and "auth.ldap.ca_file" in refused
    for wrong, reason in (
        ({"days": -1}, "certificate has expired"),
        ({"hosts": ("ldap.example.org",)}, "certificate is not valid for '127.0.0.1'"),
    ):
        with Slapd(tmp_path / reason.replace(" ", "-"), **wrong) as bad:
            for url in (bad.url, bad.tls_url):
                assert reason in why_not(ldap(bad, servers=[url]))


def test_no_password_is_sent_without_encryption(ldap, server):
    assert "confidentiality" in why_not(ldap(servers=[server.url], start_tls=False)).lower()
    assert sign_in(ldap(servers=[server.url])) == "alice"


def test_a_file_without_certificates_is_named(ldap, tmp_path):
    (tmp_path / "empty").write_text("")
    assert str(tmp_path / "empty") in why_not(ldap(ca_file=tmp_path / "empty"))
    assert str(tmp_path / "none") in why_not(ldap(ca_file=tmp_path / "none"))


def test_the_next_server_is_asked_when_one_is_down_or_silent(ldap, server, tmp_path):
    down = f"ldaps://127.0.0.1:{free_port()}"
    authenticator = ldap(servers=[down, server.tls_url])
    assert sign_in(authenticator) == "alice"
    with Slapd(tmp_path / "other") as silent, silent.silent():
        authenticator = ldap(servers=[silent.tls_url, silent.url, server.tls_url], timeout="0.5s")
        assert sign_in(authenticator, seconds=30) == "alice"
        begin = time.monotonic()
        assert [sign_in(authenticator) for _ in range(3)] == ["alice"] * 3
        assert time.monotonic() - begin < 1.5 * 3  # not again for each sign-in
        alone = ldap(servers=[down, silent.tls_url], timeout="0.5s")
        assert down in (text := why_not(alone)) and silent.tls_url in text


def test_only_members_of_allowed_groups_sign_in_and_names_must_be_equal(ldap, server):
    assert sign_in(ldap(allow_groups=["Staff"], group_base=GROUP_BASE)) == "alice"
    for group in ("sta", "staff2", "others", "st*"):
        assert sign_in(ldap(allow_groups=[group], group_base=GROUP_BASE)) is None


def test_groups_in_groups(ldap, server):
    server.change(
        f"dn: cn=everybody,{GROUP_BASE}\nchangetype: add\nobjectClass: groupOfNames\ncn: everybody\n"
        f"member: cn=staff,{GROUP_BASE}\nmember: cn=ring,{GROUP_BASE}\n\n"
        f"dn: cn=ring,{GROUP_BASE}\nchangetype: add\nobjectClass: groupOfNames\ncn: ring\n"
        f"member: cn=everybody,{GROUP_BASE}\n\n"
        f"dn: cn=unix,{GROUP_BASE}\nchangetype: add\nobjectClass: posixGroup\ncn: unix\ngidNumber: 5\nmemberUid: alice\n"
    )
    allowed = {"allow_groups": ["everybody"], "group_base": GROUP_BASE}
    assert sign_in(ldap(**allowed)) is None
    assert sign_in(ldap(**allowed, nested_groups=True)) == "alice"
    assert sign_in(ldap(**allowed, nested_groups=True), *slapd.OUTSIDER) is None
    assert sign_in(ldap(allow_groups=["unix"], group_base=GROUP_BASE)) == "alice"
    assert sign_in(ldap(allow_groups=["unix"], group_base=GROUP_BASE), "bob", slapd.PEOPLE["bob"]) is None


def test_the_groups_of_a_user_and_the_id_of_the_account(ldap, server):
    def identity(**options):
        return ldap(**options).authenticate("alice", PASSWORD, deadline=Deadline(20))

    assert identity().groups == frozenset()
    server.change(
        f"dn: cn=long,{GROUP_BASE}\nchangetype: add\nobjectClass: groupOfNames\ncn: long\ncn: {'x' * 256}\n"
        f"member: uid=alice,{PEOPLE_BASE}\n"
    )
    groups = identity(group_base=GROUP_BASE).groups
    assert "staff" in groups and "others" not in groups
    assert "long" in groups and max(map(len, groups)) < 256, (
        "a name that is too long does not lock its members out"
    )
    subject = identity().subject
    assert re.fullmatch(r"[0-9a-f-]{36}", subject)
    with pytest.raises(Unavailable, match="has no attribute objectGUID"):
        identity(user_id_attribute="objectGUID")
    assert identity(user_id_attribute=None).subject is None
    template = {"user_dn": f"uid={{name}},{PEOPLE_BASE}", "group_base": GROUP_BASE}
    assert identity(**template).subject == subject
    assert "staff" in identity(**template).groups


@pytest.mark.parametrize("options", [{}, {"user_dn": f"uid={{name}},{PEOPLE_BASE}"}], ids=["search", "template"])
def test_a_user_is_looked_up_without_the_password(ldap, options):
    authenticator = ldap(**options, group_base=GROUP_BASE, allow_groups=["staff"])
    found = authenticator.lookup("alice", deadline=Deadline(20))
    assert (found.user, "staff" in found.groups) == ("alice", True)
    assert found == authenticator.authenticate("alice", PASSWORD, deadline=Deadline(20))
    for name in ("nobody", slapd.OUTSIDER[0], "ali*", "a b", "alice)(uid=*"):
        assert authenticator.lookup(name, deadline=Deadline(20)) is None


def test_users_are_not_looked_up_without_an_account_that_may(ldap):
    options = {"user_dn": f"uid={{name}},{PEOPLE_BASE}", "bind_dn": None, "bind_password_file": None}
    with pytest.raises(Unsupported):
        ldap(**options).lookup("alice", deadline=Deadline(20))


def test_several_names_of_one_account_are_one_user(ldap):
    authenticator = ldap(user_filter="(|(uid={name})(mail={name}))")
    assert sign_in(authenticator, "alice@example.org") == "alice"
    assert sign_in(authenticator, "alice") == "alice"
    assert sign_in(ldap(user_filter="(mail={name})"), "alice") is None


def test_special_characters_stand_for_themselves(ldap, server):
    server.change(
        f"dn: cn=O'Brien\\, Pat,{PEOPLE_BASE}\nchangetype: add\nobjectClass: inetOrgPerson\ncn: O'Brien, Pat\nsn: O'Brien\n"
        f"uid: pat.o+brien\nuserPassword: {PASSWORD}\n"
    )
    assert sign_in(ldap(), "pat.o+brien") == "pat.o+brien"
    pattern = ldap(user_dn=f"uid={{name}},{PEOPLE_BASE}")
    for authenticator in (ldap(), pattern):
        for name in (
            "*",
            "al*",
            "alice)(uid=*",
            "alice,ou=people",
            "alice+uid=bob",
            "ali\\63e",
            "alice\0",
            " alice",
        ):
            assert sign_in(authenticator, name) is None


def test_names_of_entries_are_read_as_servers_write_them(ldap, server):
    name = "cn=Smith\\, John #1 a\\=b (x)+uid=jsmith"
    server.change(
        f"dn: {name},{PEOPLE_BASE}\nchangetype: add\nobjectClass: inetOrgPerson\ncn: Smith, John #1 a=b (x)\nsn: Smith\n"
        f"uid: a.smith\nuid: jsmith\nuserPassword: {PASSWORD}\n\n"
        f'dn: cn=R\\2C D \\"1\\" #2,{GROUP_BASE}\nchangetype: add\nobjectClass: groupOfNames\ncn: R, D "1" #2\n'
        f"member: {name.replace(chr(92) + ',', chr(92) + '2C')}, {PEOPLE_BASE.upper()}\n\n"
        f"dn: cn=outer,{GROUP_BASE}\nchangetype: add\nobjectClass: groupOfNames\ncn: outer\n"
        f"member: CN=R\\, D \\221\\22 #2,{GROUP_BASE}\n"
    )
    authenticator = ldap(group_base=GROUP_BASE, nested_groups=True)
    for typed in ("jsmith", "a.smith"):
        found = authenticator.authenticate(typed, PASSWORD, deadline=Deadline(20))
        assert (found.user, found.groups) == ("jsmith", {'R, D "1" #2', "outer"})
        assert authenticator.lookup(typed, deadline=Deadline(20)) == found
    below = f"ou=R&D #2,{PEOPLE_BASE}"
    server.change(f"dn: {below}\nchangetype: add\nobjectClass: organizationalUnit\n")
    ldap(user_base=below).check(deadline=Deadline(10))
    assert sign_in(ldap(user_base=below)) is None


@pytest.fixture
def accounts(server, tmp_path):
    """Make an account that searches under a limit of `tests.support.slapd`."""

    def make(name):
        dn = f"cn={name},{slapd.BASE}"
        server.change(
            f"dn: {dn}\nchangetype: add\nobjectClass: inetOrgPerson\ncn: {name}\nsn: x\nuserPassword: {PASSWORD}\n"
        )
        (tmp_path / name).write_text(PASSWORD)
        return {"bind_dn": dn, "bind_password_file": tmp_path / name}

    return make


def test_a_user_has_more_groups_than_the_server_sends_in_one_answer(ldap, server, accounts):
    base = f"ou=many,{slapd.BASE}"
    server.change(
        f"dn: {base}\nchangetype: add\nobjectClass: organizationalUnit\n\n"
        + "\n".join(
            f"dn: cn=g{number},{base}\nchangetype: add\nobjectClass: groupOfNames\ncn: g{number}\nmember: {slapd.dn('alice')}\n"
            for number in range(600)
        )
    )
    allowed = {"group_base": base, "allow_groups": ["g599"]}
    paged, bounded = ldap(**allowed, **accounts("paged")), ldap(**allowed, **accounts("bounded"))
    found = paged.authenticate("alice", PASSWORD, deadline=Deadline(20))
    assert len(found.groups) == 600
    assert paged.lookup("alice", deadline=Deadline(20)) == found
    # A server that sends no more at all is told, and what to do: some of the groups would be the wrong answer.
    assert "sizeLimitExceeded" in (text := why_not(bounded)) and "raise the server's limit" in text


def test_references_to_other_servers_are_not_followed_and_a_base_that_is_one_is_told(ldap, server):
    for below in (f"ou=elsewhere,{PEOPLE_BASE}", f"ou=elsewhere,{slapd.BASE}"):
        server.change(
            f"dn: {below}\nchangetype: add\nobjectClass: referral\nobjectClass: extensibleObject\nou: elsewhere\n"
            "ref: ldap://192.0.2.1/ou=x,dc=example,dc=com\n"
        )
    allowed = {"group_base": slapd.BASE, "allow_groups": ["staff"]}
    assert sign_in(ldap(user_base=slapd.BASE, **allowed)) == "alice"
    assert ldap(user_base=slapd.BASE, **allowed).lookup("alice", deadline=Deadline(20)).user == "alice"
    for options in ({"user_base": below}, {"group_base": below}):
        assert "referral" in (text := why_not(ldap(**options))) and "auth.ldap.servers" in text
        with pytest.raises(Unavailable, match=r"on another server: name that one in auth\.ldap\.servers"):
            ldap(**options).check(deadline=Deadline(10))


@pytest.mark.parametrize("options", [{}, {"user_dn": f"uid={{name}},{PEOPLE_BASE}"}], ids=["search", "template"])
def test_a_disabled_account_has_left_and_one_that_is_locked_for_a_while_has_not(ldap, server, options):
    authenticator = ldap(**options)
    entry, attribute = slapd.dn("bob"), "pwdAccountLockedTime"
    assert authenticator.lookup("bob", deadline=Deadline(20)).user == "bob"
    try:
        for time_, there in (("20991231235959Z", True), ("000001010000Z", False)):
            server.change(f"dn: {entry}\nchangetype: modify\nreplace: {attribute}\n{attribute}: {time_}\n")
            assert (authenticator.lookup("bob", deadline=Deadline(20)) is not None) is there
        assert sign_in(authenticator, "bob", slapd.PEOPLE["bob"]) is None
    finally:
        server.change(f"dn: {entry}\nchangetype: modify\ndelete: {attribute}\n")
    assert authenticator.lookup("bob", deadline=Deadline(20)).user == "bob"


def test_an_account_that_must_change_its_password_is_refused(ldap, server):
    assert sign_in(ldap(), "bob", slapd.PEOPLE["bob"]) == "bob"
    server.change(f"dn: {slapd.dn('bob')}\nchangetype: modify\nreplace: pwdReset\npwdReset: TRUE\n")
    assert sign_in(ldap(), "bob", slapd.PEOPLE["bob"]) is None
    server.change(f"dn: {slapd.dn('bob')}\nchangetype: modify\ndelete: pwdReset\n")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bind_dn": f"cn=nobody,{slapd.BASE}"}, "auth.ldap.bind_dn"),
        ({"user_base": f"ou=nowhere,{slapd.BASE}"}, "auth.ldap.user_base"),
        ({"allow_groups": ["staff"], "group_base": f"ou=nowhere,{slapd.BASE}"}, "auth.ldap.group_base"),
        ({"user_filter": "(&(objectClass=inetOrgPerson)(|(uid={name})(uid=bob)))"}, "several entries"),
        ({"user_attribute": "employeeNumber"}, "auth.ldap.user_attribute"),
    ],
)
def test_a_wrong_option_is_named(ldap, options, told):
    assert told in why_not(ldap(**options))


def test_a_password_file_that_is_empty_or_missing_is_named(ldap, tmp_path):
    for name, content in (("empty", "\n"), ("missing", None)):
        file = tmp_path / name
        if content is not None:
            file.write_text(content)
        assert "bind_password_file" in why_not(ldap(bind_password_file=file))


def test_check_asks_each_server(ldap, server):
    ldap(group_base=GROUP_BASE).check(deadline=Deadline(10))
    down = f"ldap://127.0.0.1:{free_port()}"
    for options, told in (
        ({"servers": [server.tls_url, down]}, down),
        ({"user_base": f"ou=nowhere,{slapd.BASE}"}, "auth.ldap.user_base"),
        ({"group_base": f"ou=nowhere,{slapd.BASE}"}, "auth.ldap.group_base"),
    ):
        with pytest.raises(Unavailable) as caught:
            ldap(**options).check(deadline=Deadline(10))
        assert told in str(caught.value)
        assert str(caught.value).count("has no entry") <= 1, "the reason is told once"


def test_hundreds_sign_in_within_a_minute(ldap, server):
    authenticator = ldap(allow_groups=["staff"], group_base=GROUP_BASE)
    begin = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: sign_in(authenticator), range(500)))
    assert found == ["alice"] * 500
    assert time.monotonic() - begin < 60


def test_a_person_of_the_directory_gets_an_agent_and_doctor_says_what_is_wrong(
    server, ldap, short_tmp, monkeypatch
):
    options = ldap(allow_groups=["staff"], group_base=GROUP_BASE).options.model_dump(exclude_none=True)
    options = {key: str(value) if "file" in key else value for key, value in options.items()}
    with manager_in(short_tmp, monkeypatch, auth={"authenticator": "ldap", "ldap": options}) as manager:
        with client_of(manager) as client, client_of(manager, "proxy_socket") as proxy:
            assert client.check_authenticator("ldap")["findings"][0]["level"] == "ok"
            assert proxy.login("alice", PASSWORD, address="192.0.2.1")["session"]["user"] == "alice"
            assert [each["user"] for each in client.agents()["agents"]] == ["alice"]
            for name, password in (("alice", "wrong"), slapd.OUTSIDER, ("nobody", PASSWORD)):
                with pytest.raises(Forbidden) as refused:
                    proxy.login(name, password, address="192.0.2.1")
                assert refused.value.what == "Wrong name or password"
            with server.down():
                [found] = client.check_authenticator("ldap")["findings"]
                assert found["level"] == "error"
                assert server.tls_url in found["what"]
                assert "auth.ldap.servers" in found["fix"]


def test_no_password_is_sent_where_starttls_fails_without_an_error(ldap, server, monkeypatch):
    import ldap3

    monkeypatch.setattr(ldap3.Connection, "start_tls", lambda self, **_: False)
    assert "not encrypted" in why_not(ldap(servers=[server.url]))


def test_groups_decide_about_apps_and_users_who_leave_are_signed_out(server, ldap, short_tmp):
    options = ldap(group_base=GROUP_BASE).options.model_dump(exclude_none=True)
    options = {key: str(value) if "file" in key else value for key, value in options.items()}
    server.change(slapd.person("zoe", PASSWORD).replace("\n", "\nchangetype: add\n", 1).lstrip())
    server.change(
        f"dn: cn=lab,{GROUP_BASE}\nchangetype: add\nobjectClass: groupOfNames\ncn: lab\nmember: uid=zoe,{PEOPLE_BASE}\n"
        f"member: uid=bob,{PEOPLE_BASE}\n"
    )
    app = {"provider": "subprocess", "subprocess": {"command": ["/bin/false"]}}
    config = {
        "auth": {"authenticator": ["ldap", "local"], "ldap": options},
        "apps": {"demo": app, "lab": app},
        "default_app": "demo",
        "groups": {"lab": {"apps": ["lab"]}, "staff": {"apps": ["demo"]}},
    }
    with manager_in(short_tmp, None, **config) as manager:
        with client_of(manager) as client, client_of(manager, "proxy_socket") as proxy:

            def sync():
                found = client.begin_sync()
                end = time.monotonic() + 30
                while found["running"]:
                    assert time.monotonic() < end
                    time.sleep(0.05)
                    found = client.sync()
                return found

            assert client.test_sign_in("zoe")["apps"] == ["lab"]
            assert client.test_sign_in("bob", slapd.PEOPLE["bob"])["groups"] == ["lab", "staff"]
            assert client.agents()["agents"] == []
            zoe = proxy.login("zoe", PASSWORD, address="192.0.2.1")["session"]
            assert client.agent("zoe")["app"] == "lab", "the first app that she may use"
            with pytest.raises(Forbidden, match="You may not use any app here"):
                proxy.login(*slapd.OUTSIDER, address="192.0.2.1")
            client.create_agent("root", "correct horse", "demo")
            with server.down():
                assert sync()["left"] == []
                with pytest.raises(Forbidden, match="may not use any app"):  # local: signed in, and in no group
                    proxy.login("root", "correct horse", address="192.0.2.1")
            assert sync()["problems"] == []
            server.change(f"dn: uid=zoe,{PEOPLE_BASE}\nchangetype: delete\n")
            assert sync()["left"] == ["zoe"]
            with pytest.raises(NotFound):
                proxy.lookup(zoe["sha256"])
            assert client.agent("zoe")["desired"] == "stopped"
            server.change(slapd.person("zoe", PASSWORD).replace("\n", "\nchangetype: add\n", 1).lstrip())
            with pytest.raises(Forbidden, match="The name zoe belongs to another account"):
                proxy.login("zoe", PASSWORD, address="192.0.2.1")
            assert "(dispatcher auth release zoe)" in client.test_sign_in("zoe", PASSWORD)["refusal"]
            client.release_user("zoe")
            assert proxy.login("zoe", PASSWORD, address="192.0.2.1")["session"]["user"] == "zoe"
