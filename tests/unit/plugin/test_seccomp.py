"""The rules of the seccomp profile for one call."""

import errno
import json

from dispatcher.plugin import seccomp_profile


def answers(call, multicast=False):
    """Return a function of a call's arguments: the errors of all rules that match, 0 for one that allows the call."""
    rules = [
        rule for rule in json.loads(seccomp_profile(multicast=multicast))["syscalls"] if call in rule["names"]
    ]
    compare = {
        "SCMP_CMP_MASKED_EQ": lambda given, one: given & one["value"] == one["valueTwo"],
        "SCMP_CMP_EQ": lambda given, one: given == one["value"],
        "SCMP_CMP_LE": lambda given, one: given <= one["value"],
        "SCMP_CMP_GT": lambda given, one: given > one["value"],
    }

    def answer(*arguments):
        return [
            rule.get("errnoRet", 0)
            for rule in rules
            if all(compare[one["op"]](arguments[one["index"]], one) for one in rule["args"])
        ]

    return answer


def test_options_of_sockets_that_no_limit_counts_are_refused_at_their_level_alone():
    def refused(level, error, multicast=False):
        found = {option: answers("setsockopt", multicast)(3, level, option) for option in range(1 << 7)}
        assert all(each in ([0], [error] if error != 1 else []) for each in found.values()), "exactly one rule"
        return {option for option, each in found.items() if each != [0]}

    assert refused(1, errno.EPERM) == {26, 50, 51}, "filters"
    assert refused(6, errno.ENOPROTOOPT) == refused(6, errno.ENOPROTOOPT, multicast=True) == {14, 32, 38}
    assert refused(0, errno.ENOPROTOOPT) == {35, 38, 39, 41, 42, 43, 46, 48}
    assert refused(41, errno.ENOPROTOOPT) == {6, 20, 32, 42, 43, 46, 48, 57}
    assert refused(0, 0, multicast=True) == set()
    assert refused(41, errno.ENOPROTOOPT, multicast=True) == {6, 32, 57}
    assert not any(refused(level, 0) for level in (2, 17, 270))
    answer = answers("setsockopt")
    assert answer(3, 1 << 32 | 1, 26) == answer(3, 1, 1 << 32 | 26) == [], "the kernel takes 32 bits"
    assert answer(3, 1 << 32 | 41, 20) == [errno.ENOPROTOOPT]


def test_waiting_for_many_descriptors_locks_of_open_files_and_huge_pages_are_refused():
    poll, select, fcntl = answers("poll"), answers("pselect6"), answers("fcntl")
    assert [poll(7, many) for many in (1024, 1025, 1 << 32 | 5)] == [[0], [22], [22]], "EINVAL"
    assert [select(many) for many in (1024, 1025)] == [[0], [22]]
    assert [fcntl(3, command) for command in (6, 7, 36, 37, 38, 39)] == [[0], [0], [22], [22], [22], [0]]
    assert [answers("mmap")(0, 1, 3, flags) for flags in (0x22, 0x40022)] == [[0], [12]], "ENOMEM"
    assert [answers("memfd_create")(0, flags) for flags in (1, 5, 0xFFFFFFFF)] == [[0], [22], [22]], "EINVAL"
    assert [answers("shmget")(0, 1, flags) for flags in (0o600, 0o4600)] == [[0], [12]]
    names = ("setxattr", "lsetxattr", "fsetxattr", "setxattrat")
    assert [answers(name)() for name in names] == [[errno.EOPNOTSUPP]] * 4
    assert answers("getxattr")() == [0] and answers("mbind")() == []
    clone = answers("clone")
    assert [any(each == 0 for each in clone(flags)) for flags in (17, 0x400, 0x10400, 0x4100)] == [
        True,
        False,
        True,
        True,
    ], "a thread, vfork"
    assert not clone(0x20000000 | 0x10000), "a new namespace"


def test_sockets_of_listed_families_and_of_all_protocols_but_some():
    answer = answers("socket")
    for family in range(64):
        found = {protocol: answer(family, 1, protocol) for protocol in range(300)}
        refused = {protocol for protocol, each in found.items() if each == [errno.EPROTONOSUPPORT]}
        allowed = {protocol for protocol, each in found.items() if each == [0]}
        if family in (1, 2, 10, 16):
            assert refused == {33, 115, 132, 256, 262} and len(allowed) == 295, "DCCP, L2TP, SCTP, SMC, MPTCP"
        else:
            assert not allowed
    assert answer(2, 1, 1 << 32 | 262) == [errno.EPROTONOSUPPORT], "the kernel takes 32 bits"


def test_all_commands_of_ioctl_pass_but_those_that_leave_a_quota():
    rules = [rule for rule in json.loads(seccomp_profile())["syscalls"] if "ioctl" in rule["names"]]

    def passes(command):
        arguments = [rule["args"][0] for rule in rules]
        assert all(one["op"] == "SCMP_CMP_MASKED_EQ" and one["index"] == 1 for one in arguments)
        return any(command & one["value"] == one["valueTwo"] for one in arguments)

    refused = {command for command in range(1 << 16) if not passes(command)}
    assert refused == {0x5820, 0x6602}, "FS_IOC_FSSETXATTR, FS_IOC_SETFLAGS"
    for command in (0x401C5820, 0x40086602, 0x40046602, 1 << 32 | 0x401C5820):
        assert not passes(command)
    assert passes(0x801C581F) and passes(0x5401)
