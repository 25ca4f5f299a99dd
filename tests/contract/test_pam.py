"""The authenticator `pam` passes the contract, with pam_unix and accounts of a private /etc."""

import contextlib

import pytest

from dispatcher.testing import AuthenticatorContract

from tests.support.private_etc import PrivateEtc

pytestmark = [
    pytest.mark.root,
    pytest.mark.program("unshare", "nsenter", "useradd"),
    pytest.mark.xdist_group("pam"),
]
SILENT = "auth required pam_exec.so quiet /bin/sleep 60\naccount required pam_permit.so\n"


@pytest.fixture(scope="module")
def etc(tmp_path_factory):
    with PrivateEtc(tmp_path_factory.mktemp("pam")) as made:
        made.run("groupadd", "people")
        for name, password in TestPam.people.items():
            made.add(name, password, "--groups", "people")
        made.add(*TestPam.outsider)
        yield made


class TestPam(AuthenticatorContract):
    people = {"alice": "correct horse battery", "zoe": "schöne Grüße"}
    outsider = ("mallory", "let me in please")

    @pytest.fixture(autouse=True)
    def _accounts(self, etc, monkeypatch):
        self.etc = etc
        etc.use(monkeypatch)

    @pytest.fixture
    def authenticator(self):
        from dispatcher_pam.authenticator import PamAuthenticator

        options = PamAuthenticator.Options(allow_groups=["people"], refusal_time="100ms")
        return PamAuthenticator(options=options)

    @contextlib.contextmanager
    def broken_directory(self, how):
        file = self.etc.etc / "pam.d/dispatcher"
        before = file.read_text()
        file.unlink() if how == "down" else file.write_text(SILENT)
        yield
        file.write_text(before)
