"""Choosing a seccomp profile, and its rules for one call."""

import json

import pytest

from dispatcher.plugin import ProviderError
from dispatcher_docker import seccomp


def test_a_profile_that_cannot_be_read_is_named_by_its_option(tmp_path):
    with pytest.raises(ProviderError, match=r"apps\.web\.docker\.seccomp: '.*/none\.json' cannot be read"):
        seccomp.chosen(str(tmp_path / "none.json"), [], "web")
    (tmp_path / "own.json").write_text("{}")
    assert seccomp.chosen(str(tmp_path / "own.json"), [], "web") == "{}"


def test_filters_of_sockets_are_refused_at_their_level_alone():
    rules = [rule for rule in json.loads(seccomp.profile())["syscalls"] if "setsockopt" in rule["names"]]

    def passes(level, option):
        given = {1: level, 2: option}
        arguments = [rule["args"][0] for rule in rules]
        assert all(one["op"] == "SCMP_CMP_MASKED_EQ" for one in arguments)
        return any(given[one["index"]] & one["value"] == one["valueTwo"] for one in arguments)

    assert {option for option in range(1 << 12) if not passes(1, option)} == {26, 50, 51}
    assert not passes(1 << 32 | 1, 26) and not passes(1, 1 << 32 | 26), "the kernel takes 32 bits"
    assert all(passes(level, option) for level in (0, 2, 6, 17, 41, 270) for option in (26, 50, 51))


def test_all_commands_of_ioctl_pass_but_those_that_leave_a_quota():
    rules = [rule for rule in json.loads(seccomp.profile())["syscalls"] if "ioctl" in rule["names"]]

    def passes(command):
        arguments = [rule["args"][0] for rule in rules]
        assert all(one["op"] == "SCMP_CMP_MASKED_EQ" and one["index"] == 1 for one in arguments)
        return any(command & one["value"] == one["valueTwo"] for one in arguments)

    refused = {command for command in range(1 << 16) if not passes(command)}
    assert refused == {0x5820, 0x6602}, "FS_IOC_FSSETXATTR, FS_IOC_SETFLAGS"
    for command in (0x401C5820, 0x40086602, 0x40046602, 1 << 32 | 0x401C5820):
        assert not passes(command)
    assert passes(0x801C581F) and passes(0x5401)
