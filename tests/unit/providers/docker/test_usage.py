"""Usage from cgroup files and from the engine's statistics."""

import pytest
from dispatcher_docker.usage import CgroupUsage, from_statistics


def test_cgroup_files_version_1(tmp_path):
    proc = tmp_path / "proc/42"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text("5:memory:/docker/c1\n4:cpuacct,cpu:/docker/c1\n0::/\n")
    for controller in ("memory", "cpuacct", "cpu"):
        (tmp_path / controller / "docker/c1").mkdir(parents=True)
    (tmp_path / "memory/docker/c1/memory.usage_in_bytes").write_text("5000\n")
    (tmp_path / "memory/docker/c1/memory.stat").write_text("cache 1\ntotal_inactive_file 2000\n")
    (tmp_path / "cpuacct/docker/c1/cpuacct.usage").write_text("1500000000\n")
    usage = CgroupUsage(tmp_path, tmp_path / "proc")
    assert usage.read("c1") is None
    usage.learn("c1", 42)
    assert (usage.read("c1").memory, usage.read("c1").cpu_seconds) == (3000, 1.5)
    fresh = CgroupUsage(tmp_path, tmp_path / "proc")
    assert fresh.guess("c1")
    assert fresh.read("c1").memory == 3000


@pytest.mark.parametrize("where", ["docker/c1", "system.slice/docker-c1.scope"])
def test_cgroup_files_version_2(tmp_path, where):
    group = tmp_path / where
    group.mkdir(parents=True)
    (group / "memory.current").write_text("5000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 2000\n")
    (group / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    usage = CgroupUsage(tmp_path, tmp_path / "proc")
    assert usage.guess("c1")
    assert (usage.read("c1").memory, usage.read("c1").cpu_seconds) == (3000, 2.5)
    usage.forget([])
    assert not usage.knows("c1")


def test_a_cgroup_that_went_away_is_forgotten(tmp_path):
    group = tmp_path / "docker/c1"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1\n")
    usage = CgroupUsage(tmp_path, tmp_path)
    assert usage.guess("c1")
    (group / "memory.current").unlink()
    assert usage.read("c1") is None
    assert not usage.knows("c1")


def test_the_engine_s_statistics():
    found = {
        "memory_stats": {"usage": 5000, "stats": {"inactive_file": 1000}},
        "cpu_stats": {"cpu_usage": {"total_usage": 2_000_000_000}},
    }
    assert (from_statistics(found).memory, from_statistics(found).cpu_seconds) == (4000, 2.0)
    assert from_statistics({"memory_stats": {}}) is None
