"""The authenticator `ldap` passes the contract, with both ways to find a user."""

import pytest

from dispatcher.testing import AuthenticatorContract

from tests.support import slapd
from tests.support.slapd import Slapd

pytestmark = [pytest.mark.program("slapd"), pytest.mark.xdist_group("ldap")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Slapd(tmp_path_factory.mktemp("slapd")) as running:
        yield running


class Contract(AuthenticatorContract):
    people = slapd.PEOPLE
    outsider = slapd.OUTSIDER
    patience = 10.0

    @pytest.fixture(autouse=True)
    def _directory(self, server):
        self.server = server

    def options(self, server, tmp_path, **more):
        (tmp_path / "password").write_text(slapd.ADMIN_PASSWORD + "\n")
        return {
            "ca_file": server.authority.path,
            "bind_dn": slapd.ADMIN,
            "bind_password_file": tmp_path / "password",
            "group_base": slapd.GROUP_BASE,
            "allow_groups": ["Staff"],
            **more,
        }

    def broken_directory(self, how):
        return self.server.down() if how == "down" else self.server.silent()


class TestSearchWithStartTls(Contract):
    @pytest.fixture
    def authenticator(self, server, tmp_path):
        from dispatcher_ldap.authenticator import LdapAuthenticator

        options = self.options(server, tmp_path, servers=[server.url], user_base=slapd.PEOPLE_BASE)
        return LdapAuthenticator(options=LdapAuthenticator.Options(**options))


class TestPatternOverLdaps(Contract):
    @pytest.fixture
    def authenticator(self, server, tmp_path):
        from dispatcher_ldap.authenticator import LdapAuthenticator

        pattern = f"uid={{name}},{slapd.PEOPLE_BASE}"
        return LdapAuthenticator(
            options=LdapAuthenticator.Options(
                **self.options(server, tmp_path, servers=[server.tls_url], user_dn=pattern)
            )
        )


del Contract
