"""The reference authenticator and the built-in `local` pass the contract."""

import pytest

from dispatcher.manager.auth.hashing import Hasher
from dispatcher.manager.auth.local import plugin
from dispatcher.manager.storage.agents import Store
from dispatcher.manager.storage.database import Database
from dispatcher.manager.storage.rows import AgentRow
from dispatcher.testing import AuthenticatorContract
from tests.kit.authenticator_contract import FakeAuthenticatorContract


class TestFake(FakeAuthenticatorContract):
    pass


class TestLocal(AuthenticatorContract):
    people = {"alice": "Correct horse battery", "zoë": "schöne Grüße"}
    no_outsider = "each user of the database may sign in"
    no_directory = "without its database the manager answers nothing"
    no_entry_point = "a part of dispatcher"
    changes_passwords = True

    @pytest.fixture
    def authenticator(self, tmp_path):
        database = Database(f"sqlite:///{tmp_path}/dispatcher.db")
        database.open()
        store, hasher = Store(database), Hasher(memory=64, passes=1)
        for name, password in self.people.items():
            uid = 1000 + len(store.agents())
            row = AgentRow(id=0, version=1, name=name, user=name, user_id=0, app="demo", provider="fake", uid=uid,
                           created=5.0, since=5.0)  # fmt: skip
            store.create(row, password_hash=hasher.hash(password), allocated=False, events=())
        cls = plugin(store, hasher).dispatcher_register_authenticators()[0]
        yield cls(options=cls.Options())
        database.close()
