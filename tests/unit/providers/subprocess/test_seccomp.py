"""The filter of system calls, interpreted as the kernel would."""

import errno
import struct
import pytest
from dispatcher_subprocess import seccomp


def run(program, machine, number, argument=0, architecture=None, second=0, third=0, fourth=0):
    """Interpret a classic BPF program as the kernel would; return the errno, 0 when the call is allowed."""
    word = architecture if architecture is not None else seccomp.MACHINES[machine][0]
    data = struct.pack("<IIQQQQQ", number, word, 0, argument, second, third, fourth)
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("<HBBI", program, at * 8)
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == 0x54:
            accumulator &= value
        elif code == 0x06:
            return 0 if value == 0x7FFF0000 else value & 0xFFFF
        else:
            test = {0x15: accumulator == value, 0x35: accumulator >= value}[code]
            at += if_true if test else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_its_list_and_allows_the_rest(machine):
    program = seccomp.program(machine)
    refused, absent = seccomp.refused(machine), seccomp.absent(machine)
    assert len(refused) > 30
    assert absent["io_setup"] == {"x86_64": 206, "aarch64": 0}[machine]
    makers = [numbers[seccomp.MACHINES[machine][1]] for numbers in seccomp.NAMESPACE_MAKERS.values()]
    attributes = {"x86_64": {188, 189, 190, 463}, "aarch64": {5, 6, 7, 463}}[machine]
    assert refused["mbind"] == {"x86_64": 237, "aarch64": 235}[machine]
    sockets = [numbers[seccomp.MACHINES[machine][1]] for numbers in seccomp.SOCKET_MAKERS.values()]
    for number in sockets:
        open_ = {family for family in range(64) if run(program, machine, number, family) == 0}
        assert open_ == {1, 2, 10, 16}, "UNIX, INET, INET6, NETLINK"
        assert run(program, machine, number, 40) == errno.EAFNOSUPPORT, "AF_VSOCK"
        refused_ = {protocol for protocol in range(300) if run(program, machine, number, 2, third=protocol)}
        assert refused_ == {33, 115, 132, 256, 262}, "DCCP, L2TP, SCTP, SMC, MPTCP"
        assert run(program, machine, number, 2, third=1 << 32 | 262) == errno.EPROTONOSUPPORT
        assert run(program, machine, number, 1 << 32 | 40) == errno.EAFNOSUPPORT, "the kernel takes 32 bits"
    for number in range(600):
        if number in sockets:
            continue
        expected = errno.EPERM if number in refused.values() else errno.ENOSYS if number in absent.values() else 0
        if number in attributes:
            expected = errno.EOPNOTSUPP
        assert run(program, machine, number) == expected, number
    for number in makers:
        assert run(program, machine, number, 0x10000000 | 17) == errno.EPERM
        assert run(program, machine, number, 0x20000000) == 0, "other namespaces are the capabilities' business"
    assert run(program, machine, 0, architecture=0x40000003) == errno.ENOSYS, "32-bit calls have other numbers"
    if machine == "x86_64":
        assert run(program, machine, 0x40000000 | 56) == errno.ENOSYS
    assert len(program) // 8 < 4096


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_an_agent_cannot_leave_its_quota(machine):
    program, number = seccomp.program(machine), seccomp.IOCTL[seccomp.MACHINES[machine][1]]
    for command in (0x401C5820, 0x40086602, 0x40046602, 1 << 32 | 0x401C5820):
        assert run(program, machine, number, 3, second=command) == errno.EPERM, hex(command)
    for command in (0x801C581F, 0x80086601, 0x5401, 0x5413):  # reading them, terminals
        assert run(program, machine, number, 3, second=command) == 0, hex(command)
    assert run(program, machine, 469) == errno.EPERM, "file_setattr"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_options_of_sockets_that_no_limit_counts_are_refused_at_their_level_alone(machine):
    number = seccomp.SETSOCKOPT[seccomp.MACHINES[machine][1]]

    def refused(level, error, **which):
        program = seccomp.program(machine, **which)
        answers = {
            option: run(program, machine, number, 3, second=level, third=option) for option in range(1 << 10)
        }
        assert set(answers.values()) <= {0, error}
        return {option for option, answer in answers.items() if answer}

    tcp, ipv6 = {14, 32, 38}, {6, 32, 57}
    assert refused(1, errno.EPERM) == {26, 50, 51}, "filters"
    assert refused(6, errno.ENOPROTOOPT) == refused(6, errno.ENOPROTOOPT, multicast=True) == tcp
    assert refused(0, errno.ENOPROTOOPT) == {35, 38, 39, 41, 42, 43, 46, 48}
    assert refused(41, errno.ENOPROTOOPT) == ipv6 | {20, 42, 43, 46, 48}
    assert refused(0, 0, multicast=True) == set()
    assert refused(41, errno.ENOPROTOOPT, multicast=True) == ipv6
    assert not any(refused(level, 0) for level in (2, 17, 270))
    program = seccomp.program(machine)
    assert run(program, machine, number, 3, second=1 << 32 | 1, third=26) == errno.EPERM, (
        "the kernel takes 32 bits"
    )
    assert run(program, machine, number, 3, second=1, third=1 << 32 | 26) == errno.EPERM


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_waiting_for_many_descriptors_locks_of_open_files_and_huge_pages_are_refused(machine):
    program, column = seccomp.program(machine), seccomp.MACHINES[machine][1]

    def answer(call, *arguments):
        return run(
            program,
            machine,
            call[column],
            *arguments[:1],
            **dict(zip(("second", "third", "fourth"), arguments[1:])),
        )

    assert [answer(seccomp.WAITS["ppoll"], 7, many) for many in (1024, 1025, 1 << 32 | 1025)] == [0, 22, 22], (
        "EINVAL"
    )
    assert [answer(seccomp.WAITS["pselect6"], many) for many in (1024, 1025, -1 & 0xFFFFFFFF)] == [0, 22, 22]
    assert [answer(seccomp.FCNTL, 3, command) for command in (6, 7, 36, 37, 38, 39)] == [0, 0, 22, 22, 22, 0]
    assert [answer(seccomp.HUGE_PAGES["mmap"], 0, 1, 3, flags) for flags in (0x22, 0x40022)] == [0, 12], "ENOMEM"
    assert [answer(seccomp.HUGE_PAGES["memfd_create"], 0, flags) for flags in (1, 5, 0xFFFFFFFF)] == [0, 22, 22], (
        "EINVAL"
    )
    assert [answer(seccomp.HUGE_PAGES["shmget"], 0, 1, flags) for flags in (0o600, 0o4600)] == [0, 12]
    clone = seccomp.NAMESPACE_MAKERS["clone"]
    assert [answer(clone, flags) for flags in (17, 0x400, 0x10400, 0x4100)] == [0, 1, 0, 0], "a thread, vfork"


def test_no_filter_for_unknown_processors():
    assert seccomp.program("vax") == b""
