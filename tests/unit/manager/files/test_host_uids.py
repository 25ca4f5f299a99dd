"""Which host user ids agents get."""

from types import SimpleNamespace

import pytest

from dispatcher.config.host_users import HostAccounts
from dispatcher.manager.files.host_uids import HostUids
from dispatcher.plugin.errors import Conflict


def uids(first, last, *, delegated=(), taken=(), owners=()):
    accounts = HostAccounts(
        proxy_uid=1,
        proxy_gid=1,
        admin_gid=None,
        agent_uids=(first, last),
        made_up=False,
        delegated=tuple(delegated),
    )
    store = SimpleNamespace(is_taken=lambda uid: uid in taken, last_uid=lambda: None)
    return HostUids(accounts, store, SimpleNamespace(owners=lambda: set(owners)), "0")


def test_no_agent_gets_an_id_that_an_account_may_use_in_its_user_namespaces():
    given = uids(
        1900000000, 1900000009, delegated=[range(1900000002, 1900000005)], taken={1900000001}, owners={1900000007}
    )
    free = [given.allocate() for _ in range(5)]
    assert sorted(set(free)) == [1900000000, 1900000005, 1900000006, 1900000008, 1900000009]


def test_a_range_that_is_wholly_delegated_is_an_error_that_says_so():
    with pytest.raises(Conflict) as refused:
        uids(1900000000, 1900000009, delegated=[range(1900000000, 1900065536)]).allocate()
    assert "subuid" in refused.value.why
