"""Control groups, with plain directories in their place."""

import pytest
from dispatcher_subprocess.processes import cgroups
from dispatcher.plugin.model import Limits


@pytest.fixture
def tree(tmp_path):
    for name in ("memory", "cpu", "unified"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    (tmp_path / "unified/cgroup.controllers").touch()
    return tmp_path


def test_version_one_controllers_beside_version_two(tree):
    found = cgroups.discover("dispatcher-x", "4:memory:/\n3:cpu,cpuacct:/\n0::/\n", tree)
    assert found.directory == tree / "unified/dispatcher-x"
    assert set(found.legacy) == {"memory", "cpu"}
    assert found.limits("memory") and found.limits("cpu") and not found.limits("pids")
    group = found.group("a")
    for name in ("memory", "cpu"):
        path = tree / name / "dispatcher-x/a"
        path.mkdir()
        for file in ("memory.limit_in_bytes", "cpu.cfs_quota_us"):
            (path / file).touch()
    used = group.create(Limits(memory=1000, cpus=0.5))
    assert [path.parent.parent.name for path in used] == ["memory", "cpu", "unified"]
    assert (tree / "memory/dispatcher-x/a/memory.limit_in_bytes").read_text() == "1000"
    assert (tree / "cpu/dispatcher-x/a/cpu.cfs_quota_us").read_text() == "50000"
    (tree / "memory/dispatcher-x/a/memory.usage_in_bytes").write_text("5000\n")
    (tree / "memory/dispatcher-x/a/memory.stat").write_text("cache 9\ntotal_inactive_file 2000\n")
    (tree / "unified/dispatcher-x/a/cpu.stat").write_text("usage_usec 2500000\n")
    usage = group.usage()
    assert (usage.memory, usage.cpu_seconds) == (3000, 2.5)
    (tree / "memory/dispatcher-x/a/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert group.oom_kills() == 2


def test_version_one_alone_is_not_used(tree):
    (tree / "unified/cgroup.controllers").unlink()
    found = cgroups.discover("dispatcher-x", "4:memory:/\n", tree)
    assert found.group("a") is None and not found.limits("memory")
    assert not (tree / "memory/dispatcher-x").exists()


def test_version_two_with_controllers(tmp_path):
    (tmp_path / "cgroup.procs").touch()
    (tmp_path / "cgroup.subtree_control").touch()
    base = tmp_path / "dispatcher-x"
    base.mkdir()
    (base / "cgroup.subtree_control").write_text("cpu memory pids\n")
    (tmp_path / "cgroup.controllers").touch()
    # Writing appends nothing here; a kernel would answer with what is on.
    found = cgroups.Cgroups(directory=base, controllers=frozenset({"cpu", "memory", "pids"}))
    assert cgroups.discover("dispatcher-x", "0::/\n", tmp_path).directory == base
    group = found.group("a")
    path = base / "a"
    path.mkdir()
    for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max", "cgroup.freeze", "cgroup.procs"):
        (path / name).touch()
    assert group.create(Limits(memory=1 << 20, swap=0, cpus=1.5, pids=40)) == [path]
    assert (path / "memory.max").read_text() == str(1 << 20)
    assert (path / "memory.swap.max").read_text() == "0"
    assert (path / "cpu.max").read_text() == "150000 100000"
    assert (path / "pids.max").read_text() == "40"
    (path / "memory.current").write_text("4096\n")
    (path / "memory.stat").write_text("inactive_file 96\n")
    (path / "cpu.stat").write_text("usage_usec 1500000\n")
    (path / "memory.events").write_text("low 0\noom 3\noom_kill 1\n")
    assert group.usage().memory == 4000 and group.usage().cpu_seconds == 1.5 and group.oom_kills() == 1
    cgroups.join([path], 77)
    assert (path / "cgroup.procs").read_text() == "77"


def test_an_ordinary_user_gets_the_highest_group_that_is_theirs(tmp_path):
    slice_ = tmp_path / "user.slice/user-1000.slice/user@1000.service"
    app = slice_ / "app.slice/terminal.scope"
    app.mkdir(parents=True)
    for path in (slice_, slice_ / "app.slice", app):
        (path / "cgroup.procs").touch()
    (tmp_path / "cgroup.controllers").touch()
    own = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/terminal.scope\n"
    found = cgroups.discover("dispatcher-x", own, tmp_path)
    assert found.directory == slice_ / "dispatcher-x"


def test_agents_are_in_the_group_of_their_unit_where_the_manager_runs_beside_it(tmp_path):
    (tmp_path / "cgroup.controllers").touch()
    unit = tmp_path / "dispatcher.slice/dispatcher-agents.service"
    unit.mkdir(parents=True)
    own = "0::/dispatcher.slice/dispatcher-manager.service\n"
    found = cgroups.discover("dispatcher-x", own, tmp_path)
    assert found.directory == unit / "dispatcher-x"
    (unit / "helpers").mkdir()
    (unit / "helpers/cgroup.procs").touch()
    found.adopt(77)
    assert (unit / "helpers/cgroup.procs").read_text() == "77"


def test_no_control_groups_at_all(tmp_path):
    assert cgroups.discover("dispatcher-x", "0::/\n", tmp_path).group("a") is None
    assert cgroups.discover("dispatcher-x", "", tmp_path / "gone").group("a") is None
