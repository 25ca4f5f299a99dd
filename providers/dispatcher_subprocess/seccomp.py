"""A filter of system calls for agents: calls that help to attack the kernel and that ordinary apps do not need.

bubblewrap loads the filter, a classic BPF program (seccomp(2)).  It lists what is refused, not what is allowed,
so that apps work: kernel keys (which no namespace separates), BPF, performance counters, user namespaces, mounts,
modules, io_uring, libaio, socket filters, and what would leave the quota of the data directory.  Sockets are
the exception: just the families that network namespaces and modes of files separate are allowed, as AF_VSOCK is
one space for the host and all that runs on it.
Other processors than those below get no filter.  It is assembled here because the bindings of
libseccomp on PyPI need a shared library that may be absent, or too old to know a call.
"""

from __future__ import annotations

import errno
import functools
import platform
import socket
import struct

_LOAD_WORD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT, _THIRD_ARGUMENT = (
    0,
    4,
    16,
    24,
    32,
)  # offsets in struct seccomp_data, little endian
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
#: Refused with EAFNOSUPPORT, as a kernel without the family does, unless the first argument is one of FAMILIES.
SOCKET_MAKERS = {"socket": (41, 198), "socketpair": (53, 199)}
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
IOCTL = (16, 29)
#: Commands of ioctl that are refused: the owner of a file may change its project, and so leave its quota.
QUOTA_IOCTLS = {"FS_IOC_FSSETXATTR": 0x401C5820, "FS_IOC_SETFLAGS": 0x40086602, "FS_IOC32_SETFLAGS": 0x40046602}
SETSOCKOPT = (54, 208)
#: Options of the level SOL_SOCKET that are refused: socket filters, which no limit of memory counts.
SOCKET_FILTERS = {"SO_ATTACH_FILTER": 26, "SO_ATTACH_BPF": 50, "SO_ATTACH_REUSEPORT_CBPF": 51}
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
def program(machine: str = "") -> bytes:
    """Return the filter for a processor (by default this host's), b"" for one that is not known.

    :param machine: as ``uname -m`` calls it.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        return b""
    architecture, column = MACHINES[machine]
    refuse, pretend = _REFUSE | errno.EPERM, _REFUSE | errno.ENOSYS
    # Calls of another architecture (32-bit programs) have other numbers and would not be matched: refused.
    body = [_load(_ARCHITECTURE), _jump(_JUMP_EQUAL, architecture, 1, 0), _return(pretend), _load(_NUMBER)]
    if machine == "x86_64":
        body += [_jump(_JUMP_GREATER_EQUAL, _X32, 0, 1), _return(pretend)]
    for answer, numbers in ((pretend, absent(machine)), (refuse, refused(machine))):
        for number in numbers.values():
            body += [_jump(_JUMP_EQUAL, number, 0, 1), _return(answer)]
    for maker in NAMESPACE_MAKERS.values():
        body += [
            _jump(_JUMP_EQUAL, maker[column], 0, 4),
            _load(_FIRST_ARGUMENT),
            _jump(_JUMP_SET, _NEW_USER, 0, 1),
            _return(refuse),
            _return(_ALLOW),
        ]
    for maker in SOCKET_MAKERS.values():
        allowed = [_jump(_JUMP_EQUAL, family, len(FAMILIES) - at, 0) for at, family in enumerate(FAMILIES)]
        body += [
            _jump(_JUMP_EQUAL, maker[column], 0, len(FAMILIES) + 3),
            _load(_FIRST_ARGUMENT),
            *allowed,
            _return(_REFUSE | errno.EAFNOSUPPORT),
            _return(_ALLOW),
        ]
    matches = [_jump(_JUMP_EQUAL, one, len(QUOTA_IOCTLS) - at, 0) for at, one in enumerate(QUOTA_IOCTLS.values())]
    body += [
        _jump(_JUMP_EQUAL, IOCTL[column], 0, len(QUOTA_IOCTLS) + 3),
        _load(_SECOND_ARGUMENT),
        *matches,
        _return(_ALLOW),
        _return(refuse),
    ]
    options = SOCKET_FILTERS.values()
    body += [
        _jump(_JUMP_EQUAL, SETSOCKOPT[column], 0, len(options) + 5),
        _load(_SECOND_ARGUMENT),
        _jump(_JUMP_EQUAL, socket.SOL_SOCKET, 0, len(options) + 1),
        _load(_THIRD_ARGUMENT),
        *(_jump(_JUMP_EQUAL, one, len(options) - at, 0) for at, one in enumerate(options)),
        _return(_ALLOW),
        _return(refuse),
    ]
    return b"".join([*body, _return(_ALLOW)])


def _load(offset: int) -> bytes:
    return struct.pack("<HBBI", _LOAD_WORD, 0, 0, offset)


def _jump(kind: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("<HBBI", kind, if_true, if_false, value)


def _return(value: int) -> bytes:
    return struct.pack("<HBBI", _RETURN, 0, 0, value)
