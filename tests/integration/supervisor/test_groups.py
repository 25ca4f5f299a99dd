"""Groups: which apps their members may use, their limits, and what becomes of agents when a user leaves one."""

import pytest

from dispatcher.config.load import parse
from dispatcher.manager.agents.lifecycle import State
from dispatcher.manager.storage.rows import Desired
from dispatcher.plugin.errors import Forbidden
from tests.support.manager_world import reach, until

APP = {"provider": "fake", "memory": "1G", "fake": {}}


@pytest.fixture
def supervisor(world):
    world.data["apps"] = {"demo": dict(APP), "lab": dict(APP)}
    world.data["groups"] = {
        "staff": {"apps": ["lab"], "limits": {"memory": "4G"}},
        "sta": {"limits": {"memory": "8G"}},
        "team": {"apps": ["lab"], "members": ["Bob"], "limits": {"memory": "2G", "cpus": 2}},
    }
    return world.supervisor()


def limits(supervisor, name):
    return supervisor.registry.specs.spec(supervisor.registry.find(name).row).app.limits


def running(supervisor, name):
    supervisor.commands.set_desired(name, Desired.RUNNING)
    reach(supervisor, name, State.RUNNING)


def made(supervisor, name, groups, app="lab"):
    supervisor.commands.create(name, app=app, password_hash=None)
    supervisor.store.bind_user(name, "ldap", None, groups)
    supervisor.access.set_groups(name, groups)


def test_an_app_of_a_group_starts_for_its_members_only(supervisor):
    told = []
    supervisor.access.on_change = told.append
    made(supervisor, "alice", ["staff"])
    made(supervisor, "bob", [])
    made(supervisor, "carol", ["sta", "staffers", "Staff"])
    supervisor.access.set_groups("alice", ["staff"])
    assert told == ["alice", "carol"], "groups that have not changed are no change"
    running(supervisor, "alice")
    running(supervisor, "bob")
    for command in (
        lambda: supervisor.commands.set_desired("carol", Desired.RUNNING),
        lambda: supervisor.commands.restart("carol"),
    ):
        with pytest.raises(
            Forbidden, match="carol may not use the app lab: it is for members of 'staff' or 'team'"
        ):
            command()
    supervisor.commands.wake("carol")
    until(lambda: supervisor.queries.view("carol").state is State.FAILED)
    assert "carol may not use the app lab" in supervisor.queries.view("carol").failure.what


def test_a_user_who_leaves_the_group_loses_the_running_agent_and_keeps_the_data(supervisor):
    made(supervisor, "alice", ["staff"])
    running(supervisor, "alice")
    supervisor.access.set_groups("alice", [])
    reach(supervisor, "alice", State.STOPPED)
    detail = [event.detail for event in supervisor.queries.events("alice", 100) if event.kind == "stopped"]
    assert detail == ["alice may not use the app lab"]
    assert supervisor.data.data_dir("alice").exists()
    supervisor.access.set_groups("alice", ["staff"])
    running(supervisor, "alice")


def test_other_apps_are_for_everybody(supervisor):
    made(supervisor, "carol", [], app="demo")
    running(supervisor, "carol")


def test_a_new_configuration_stops_what_it_does_not_allow(world, supervisor):
    made(supervisor, "carol", [], app="demo")
    running(supervisor, "carol")
    world.data["groups"]["staff"]["apps"] = ["lab", "demo"]
    changed = supervisor.apply_config(parse(world.data))
    assert "The group 'staff' has changed." in changed
    assert "agents that are stopped, as their users may not use the app: 1" in changed
    reach(supervisor, "carol", State.STOPPED)


def test_groups_hold_after_a_restart_of_the_manager(world, supervisor):
    made(supervisor, "alice", ["staff"])
    running(supervisor, "alice")
    supervisor.close()
    again = world.supervisor()
    reach(again, "alice", State.RUNNING)
    again.store.bind_user("alice", "ldap", None, [])
    again.close()
    last = world.supervisor()
    reach(last, "alice", State.STOPPED)


def test_the_highest_limit_of_the_groups_replaces_the_app_s(supervisor):
    made(supervisor, "alice", ["staff"])
    made(supervisor, "bob", [])
    made(supervisor, "dave", ["staff", "team"])
    made(supervisor, "carol", [], app="demo")
    assert [limits(supervisor, name).memory >> 30 for name in ("alice", "bob", "dave", "carol")] == [4, 2, 4, 1]
    assert [limits(supervisor, name).cpus for name in ("alice", "bob", "dave")] == [None, 2, 2]


def test_a_member_s_agent_is_outdated_when_the_limits_become_others(supervisor):
    made(supervisor, "alice", ["staff"])
    running(supervisor, "alice")
    assert not supervisor.queries.view("alice").outdated
    supervisor.access.set_groups("alice", ["staff", "sta"])
    assert supervisor.queries.view("alice").outdated
    assert limits(supervisor, "alice").memory >> 30 == 8


def test_a_later_user_of_the_same_name_is_in_no_group(supervisor):
    made(supervisor, "alice", ["staff"])
    supervisor.commands.remove("alice", keep_data=False)
    until(lambda: not supervisor.queries.views(user="alice"))
    supervisor.commands.create("alice", app="lab", password_hash="hash")
    assert not supervisor.access.may_use("alice", "lab")


def test_the_first_app_is_one_that_the_user_may_use(world):
    world.data["apps"] = {"lab": dict(APP), "demo": dict(APP), "other": dict(APP)}
    world.data["groups"] = {"staff": {"apps": ["lab"]}, "all": {"apps": ["demo", "other"]}}
    supervisor = world.supervisor()
    assert supervisor.access.first_app("alice", ["staff"]) == "lab"
    assert supervisor.access.first_app("alice", ["all"]) == "demo"
    assert supervisor.access.first_app("alice", []) is None
    assert supervisor.access.first_app("alice", ["staff", "all"]) == "demo"


def test_the_first_app_of_a_user_who_may_use_all_is_the_first_in_the_file(world):
    world.data["apps"] = {"notes": dict(APP), "lab": dict(APP)}
    world.data["groups"] = {"staff": {"apps": ["lab"]}, "all": {"apps": ["notes"]}}
    assert world.supervisor().access.first_app("alice", ["staff", "all"]) == "notes"
    world.data["default_app"] = "lab"
    assert world.supervisor().access.first_app("alice", ["staff", "all"]) == "lab"
