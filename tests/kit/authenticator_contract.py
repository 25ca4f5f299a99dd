"""The contract of authenticators over the reference one, or over one that is broken on purpose."""

import pytest

from dispatcher.testing import AuthenticatorContract
from tests.support.fake_authenticator import FakeAuthenticator, FakeDirectory


class FakeAuthenticatorContract(AuthenticatorContract):
    authenticator_class = FakeAuthenticator
    people = {"alice": "Correct horse battery", "bob": "schöne Grüße", "zoë@example.org": "another one of them"}
    outsider = ("mallory", "let me in please")
    no_entry_point = "only these tests use it"
    patience = 2.0
    silent_seconds = 0.1

    @property
    def directory(self):
        return FakeDirectory.named(type(self).__qualname__)

    @pytest.fixture
    def authenticator(self):
        for name, password in self.people.items():
            self.directory.add(name, password)
        self.directory.add(*self.outsider, locked=True)
        made = self.authenticator_class(
            options=self.authenticator_class.Options(directory=type(self).__qualname__)
        )
        yield made
        made.close()

    def broken_directory(self, how):
        return self.directory.outage(how)
