"""Who is who on the host: root with the proxy's user, root without, an ordinary user."""

import grp
import pwd
from types import SimpleNamespace

import pytest

from dispatcher.config.load import parse
from dispatcher.config.host_users import host_accounts, subordinate_ids


@pytest.fixture
def host(monkeypatch):
    """A host whose users and groups a test says."""

    def host(*, euid, users=None, groups=None):
        def find(table):
            def get(name):
                if name not in (table or {}):
                    raise KeyError(name)
                return SimpleNamespace(pw_uid=table[name], pw_gid=table[name], gr_gid=table[name])

            return get

        monkeypatch.setattr("os.geteuid", lambda: euid)
        monkeypatch.setattr("os.getegid", lambda: euid)
        monkeypatch.setattr(pwd, "getpwnam", find(users))
        monkeypatch.setattr(grp, "getgrnam", find(groups))
        return host_accounts(parse({"manager": {"uid_range": [5000, 5999]}}))

    return host


def test_an_ordinary_user_is_everybody(host):
    found = host(euid=1000)
    assert (found.proxy_uid, found.proxy_gid, found.admin_gid, found.agent_uids) == (1000, 1000, None, None)
    assert not found.made_up


def test_root_with_a_proxy_user(host):
    found = host(
        euid=0, users={"dispatcher-proxy": 990}, groups={"dispatcher-proxy": 991, "dispatcher-admin": 992}
    )
    assert (found.proxy_uid, found.proxy_gid, found.admin_gid) == (990, 991, 992)
    assert not found.made_up


def test_root_with_a_proxy_user_whose_group_has_another_name(host):
    found = host(euid=0, users={"dispatcher-proxy": 990})
    assert (found.proxy_uid, found.proxy_gid, found.admin_gid) == (990, 990, None)


def test_root_without_one_makes_it_up_and_never_gives_that_id_to_an_agent(host):
    found = host(euid=0)
    assert found.made_up
    assert found.proxy_uid == found.proxy_gid == 5000
    assert found.agent_uids == (5001, 5999)


def test_ids_of_user_namespaces_are_read_from_both_files(tmp_path):
    (tmp_path / "subuid").write_text("carol:165536:65536\nbroken line\n1000:9:x\n")
    (tmp_path / "subgid").write_text("carol:231072:65536\n")
    assert subordinate_ids(tmp_path) == [
        (f"carol in {tmp_path}/subuid", range(165536, 231072)),
        (f"carol in {tmp_path}/subgid", range(231072, 296608)),
    ]
    assert subordinate_ids(tmp_path / "none") == []


def test_the_default_range_is_no_range_that_useradd_or_systemd_gives_away():
    first, last = parse({}).manager.uid_range
    assert first > 1879048191, "containers of systemd-nspawn; SUB_UID_MAX of login.defs is 600100000"
    assert last < 2**31, "Docker's engine takes no larger id"
