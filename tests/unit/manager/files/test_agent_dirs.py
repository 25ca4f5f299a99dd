"""The directories of agents: what a deletion leaves that was interrupted."""

from __future__ import annotations

import os

import pytest

from dispatcher.config.host_users import HostAccounts
from dispatcher.config.layout import Paths
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.plugin.errors import Cancelled

ME = HostAccounts(proxy_uid=os.geteuid(), proxy_gid=os.getegid(), admin_gid=None, agent_uids=None, made_up=False)


def interrupted():
    raise Cancelled("busy")


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def data(tmp_path, state):
    made = AgentData(Paths(tmp_path / "run", state), ME)
    made.begin(new_boot=False)
    for agent in ("alice", "alice:notes"):
        made.prepare(agent, os.geteuid())
        for number in range(2000):
            (made.data_dir(agent) / f"{agent}-{number}").touch()
    return made


def left(state, agent):
    return [path for path in state.rglob(f"{agent}-*") if path.is_file()]


@pytest.mark.parametrize("delete", ["remove", "reset"])
def test_a_second_attempt_deletes_what_the_first_has_left(data, state, delete):
    calls = {
        "remove": lambda tick: data.remove("alice", keep_data=False, tick=tick),
        "reset": lambda tick: data.reset("alice", os.geteuid(), tick),
    }
    with pytest.raises(Cancelled, match="busy"):
        calls[delete](interrupted)
    assert left(state, "alice")
    calls[delete](None)
    assert left(state, "alice") == []
    assert len(left(state, "alice:notes")) == 2000
