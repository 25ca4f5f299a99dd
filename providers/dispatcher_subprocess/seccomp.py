"""A filter of system calls for agents: calls that help to attack the kernel and that ordinary apps do not need.

bubblewrap loads the filter, a classic BPF program (seccomp(2)).  It lists what is refused, not what is allowed,
so that apps work: kernel keys (which no namespace separates), BPF, performance counters, user namespaces, mounts,
modules, io_uring, libaio, kernel memory that no limit counts (`system_calls` of `dispatcher.plugin`), and what
would leave the quota of the data directory.  Sockets are the exception: just the families that network namespaces
and modes of files separate are allowed, as AF_VSOCK is one space for the host and all that runs on it.
Other processors than those below get no filter.  It is assembled here because the bindings of
libseccomp on PyPI need a shared library that may be absent, or too old to know a call.
"""

from __future__ import annotations

import errno
import functools
import platform
import socket
import struct
from collections.abc import Collection

from dispatcher.plugin import system_calls

_LOAD_WORD, _AND, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data, little endian
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000
_NEW_USER = 0x10000000  # CLONE_NEWUSER
_X32 = 0x40000000

#: Machine, as ``uname -m`` calls it -> audit architecture, column of its numbers below.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
#: Refused with EPERM.
_REFUSED: dict[str, tuple[int, int | None]] = {
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "setns": (308, 268),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "file_setattr": (469, 469),
    "open_by_handle_at": (304, 265),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "mbind": (237, 235),  # a policy of a file in memory stays until the file is gone, 0.8 KiB for each page
    "iopl": (172, None),
    "ioperm": (173, None),
}
#: Refused with ENOSYS, so that programs fall back to older calls.
_ABSENT = {
    "clone3": (435, 435),
    "io_setup": (206, 0),  # takes from fs.aio-max-nr, one number for the whole host
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
#: Calls of `system_calls.ATTRIBUTES`.
ATTRIBUTES = {"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463)}
#: Refused with EAFNOSUPPORT, as a kernel without the family does, unless the first argument is one of FAMILIES.
SOCKET_MAKERS = {"socket": (41, 198), "socketpair": (53, 199)}
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
IOCTL = (16, 29)
#: Commands of ioctl that are refused: the owner of a file may change its project, and so leave its quota.
QUOTA_IOCTLS = {"FS_IOC_FSSETXATTR": 0x401C5820, "FS_IOC_SETFLAGS": 0x40086602, "FS_IOC32_SETFLAGS": 0x40046602}
SETSOCKOPT = (54, 208)
FCNTL = (72, 25)
#: Calls of `system_calls.WAITS`; aarch64 has no poll and select.
WAITS = {"poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72)}
#: Calls of `system_calls.HUGE_PAGES`.
HUGE_PAGES = {"mmap": (9, 222), "memfd_create": (319, 279), "shmget": (29, 194)}
#: Refused if their first argument asks for a user namespace.
NAMESPACE_MAKERS = {"clone": (56, 220), "unshare": (272, 97)}


def refused(machine: str) -> dict[str, int]:
    """Return the system calls that are refused with EPERM, and their numbers."""
    column = MACHINES[machine][1]
    found = {name: numbers[column] for name, numbers in _REFUSED.items()}
    return {name: number for name, number in found.items() if number is not None}


def absent(machine: str) -> dict[str, int]:
    """Return the system calls that are refused with ENOSYS, and their numbers."""
    return {name: numbers[MACHINES[machine][1]] for name, numbers in _ABSENT.items()}


@functools.cache
def program(machine: str = "", *, multicast: bool = False) -> bytes:
    """Return the filter for a processor (by default this host's), b"" for one that is not known.

    :param machine: as ``uname -m`` calls it; :param multicast: membership in multicast groups is allowed.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        return b""
    architecture, column = MACHINES[machine]
    # Calls of another architecture (32-bit programs) have other numbers and would not be matched: refused.
    body = [
        _load(_ARCHITECTURE),
        _jump(_JUMP_EQUAL, architecture, 1, 0),
        _refuse(errno.ENOSYS),
        _load(_NUMBER),
    ]
    if machine == "x86_64":
        body += [_jump(_JUMP_GREATER_EQUAL, _X32, 0, 1), _refuse(errno.ENOSYS)]
    attributes = {name: ATTRIBUTES[name][column] for name in system_calls.ATTRIBUTES}
    for error, numbers in (
        (errno.ENOSYS, absent(machine)),
        (errno.EPERM, refused(machine)),
        (system_calls.ATTRIBUTE_ERROR, attributes),
    ):
        for number in numbers.values():
            body += [_jump(_JUMP_EQUAL, number, 0, 1), _refuse(error)]
    files, thread = system_calls.CLONE_FILES, system_calls.CLONE_THREAD
    body += _call(
        NAMESPACE_MAKERS["clone"][column],
        _bits(0, _NEW_USER, _NEW_USER, errno.EPERM) + _bits(0, files | thread, files, errno.EPERM),
    )
    body += _call(NAMESPACE_MAKERS["unshare"][column], _bits(0, _NEW_USER, _NEW_USER, errno.EPERM))
    for maker in SOCKET_MAKERS.values():
        protocols = _any_of(2, system_calls.PROTOCOLS.values(), system_calls.PROTOCOL_ERROR)
        body += _call(maker[column], _none_of(0, FAMILIES, errno.EAFNOSUPPORT) + protocols)
    body += _call(IOCTL[column], _any_of(1, QUOTA_IOCTLS.values(), errno.EPERM))
    options = _level(socket.SOL_SOCKET, system_calls.SOCKET_FILTERS.values(), errno.EPERM)
    for level, numbers_of_level in system_calls.refused_options(multicast=multicast).items():
        options += _level(level, numbers_of_level, system_calls.OPTION_ERROR)
    body += _call(SETSOCKOPT[column], options)
    body += _call(FCNTL[column], _any_of(1, system_calls.FILE_LOCKS.values(), system_calls.LOCK_ERROR))
    for name, position in system_calls.WAITS.items():
        if (call := WAITS[name][column]) is not None:
            body += _call(call, _above(position, system_calls.MOST_WAITED, system_calls.WAIT_ERROR))
    for name, (position, flag, error) in system_calls.HUGE_PAGES.items():
        body += _call(HUGE_PAGES[name][column], _bits(position, flag, flag, error))
    return b"".join([*body, _return(_ALLOW)])


# Each of the next functions makes a part that refuses a call by an argument, or goes on behind the part.


def _call(number: int, part: list[bytes]) -> list[bytes]:
    """Apply a part to one system call, and allow the call otherwise."""
    return [_jump(_JUMP_EQUAL, number, 0, len(part) + 1), *part, _return(_ALLOW)]


def _any_of(argument: int, values: Collection[int], error: int) -> list[bytes]:
    last = len(values) - 1
    found = [_jump(_JUMP_EQUAL, value, last - at, int(at == last)) for at, value in enumerate(values)]
    return [_load_argument(argument), *found, _refuse(error)]


def _none_of(argument: int, values: Collection[int], error: int) -> list[bytes]:
    found = [_jump(_JUMP_EQUAL, value, len(values) - at, 0) for at, value in enumerate(values)]
    return [_load_argument(argument), *found, _refuse(error)]


def _bits(argument: int, mask: int, value: int, error: int) -> list[bytes]:
    masked = struct.pack("<HBBI", _AND, 0, 0, mask)
    return [_load_argument(argument), masked, _jump(_JUMP_EQUAL, value, 0, 1), _refuse(error)]


def _above(argument: int, most: int, error: int) -> list[bytes]:
    return [_load_argument(argument), _jump(_JUMP_GREATER_EQUAL, most + 1, 0, 1), _refuse(error)]


def _level(level: int, options: Collection[int], error: int) -> list[bytes]:
    """Refuse options of a level of setsockopt(2)."""
    part = _any_of(2, options, error)
    return [_load_argument(1), _jump(_JUMP_EQUAL, level, 0, len(part)), *part]


def _load_argument(position: int) -> bytes:
    return _load(_ARGUMENTS + 8 * position)


def _load(offset: int) -> bytes:
    return struct.pack("<HBBI", _LOAD_WORD, 0, 0, offset)


def _jump(kind: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("<HBBI", kind, if_true, if_false, value)


def _refuse(error: int) -> bytes:
    return _return(_REFUSE | error)


def _return(value: int) -> bytes:
    return struct.pack("<HBBI", _RETURN, 0, 0, value)
