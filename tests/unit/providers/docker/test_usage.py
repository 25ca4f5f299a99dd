"""Usage from cgroup files and from the engine's statistics."""

import pytest
from dispatcher_docker.usage import counts_socket_buffers_apart, from_cgroup, from_statistics, limit_socket_buffers


def test_cgroup_files_version_1(tmp_path):
    for controller in ("memory", "cpuacct"):
        (tmp_path / controller / "docker/c1").mkdir(parents=True)
    (tmp_path / "memory/docker/c1/memory.usage_in_bytes").write_text("5000\n")
    (tmp_path / "memory/docker/c1/memory.stat").write_text("cache 1\ntotal_inactive_file 2000\n")
    (tmp_path / "cpuacct/docker/c1/cpuacct.usage").write_text("1500000000\n")
    usage = from_cgroup("c1", tmp_path)
    assert (usage.memory, usage.cpu_seconds) == (3000, 1.5)


@pytest.mark.parametrize("where", ["docker/c1", "system.slice/docker-c1.scope"])
def test_cgroup_files_version_2(tmp_path, where):
    group = tmp_path / where
    group.mkdir(parents=True)
    (group / "memory.current").write_text("5000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 2000\n")
    (group / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    usage = from_cgroup("c1", tmp_path)
    assert (usage.memory, usage.cpu_seconds) == (3000, 2.5)
    (group / "memory.current").unlink()
    assert from_cgroup("c1", tmp_path) is None, "the container has ended"


def test_the_engine_s_statistics():
    found = {
        "memory_stats": {"usage": 5000, "stats": {"inactive_file": 1000}},
        "cpu_stats": {"cpu_usage": {"total_usage": 2_000_000_000}},
    }
    assert (from_statistics(found).memory, from_statistics(found).cpu_seconds) == (4000, 2.0)
    assert from_statistics({"memory_stats": {}}) is None


def test_buffers_of_sockets_are_limited_where_they_are_counted_apart(tmp_path):
    assert not counts_socket_buffers_apart(tmp_path)
    for name in ("", "docker/c1"):
        (tmp_path / "memory" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "memory" / name / "memory.kmem.tcp.limit_in_bytes").write_text("9223372036854771712")
    assert counts_socket_buffers_apart(tmp_path)
    limit_socket_buffers("c1", 4096, tmp_path)
    assert (tmp_path / "memory/docker/c1/memory.kmem.tcp.limit_in_bytes").read_text() == "4096"
    limit_socket_buffers("gone", 4096, tmp_path)
