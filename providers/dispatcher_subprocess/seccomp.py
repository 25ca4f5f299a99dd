"""A filter of system calls for agents: what attacks kernels and no ordinary app needs is refused.  Pure.

bubblewrap loads the filter (a classic BPF program, see seccomp(2)).  It is a short list of refusals, not of what
is allowed, so that apps work: kernel keys (they are no part of any namespace), BPF, performance counters, user
namespaces, mounts, modules, io_uring.  On processors it does not know there is no filter.
"""

from __future__ import annotations

import errno
import functools
import platform
import struct

_LOAD_WORD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little endian
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000
_NEW_USER = 0x10000000  # CLONE_NEWUSER
_X32 = 0x40000000

#: Machine -> audit architecture, system calls refused with EPERM, with ENOSYS (so that programs fall back).
_CALLS: dict[str, tuple[int, dict[str, int], dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "bpf": 321,
            "perf_event_open": 298,
            "userfaultfd": 323,
            "kexec_load": 246,
            "kexec_file_load": 320,
            "init_module": 175,
            "finit_module": 313,
            "delete_module": 176,
            "mount": 165,
            "umount2": 166,
            "pivot_root": 155,
            "open_tree": 428,
            "move_mount": 429,
            "fsopen": 430,
            "fsconfig": 431,
            "fsmount": 432,
            "fspick": 433,
            "mount_setattr": 442,
            "setns": 308,
            "swapon": 167,
            "swapoff": 168,
            "reboot": 169,
            "acct": 163,
            "quotactl": 179,
            "quotactl_fd": 443,
            "open_by_handle_at": 304,
            "syslog": 103,
            "vhangup": 153,
            "lookup_dcookie": 212,
            "iopl": 172,
            "ioperm": 173,
        },
        {"clone3": 435, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    ),
    "aarch64": (
        0xC00000B7,
        {
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "bpf": 280,
            "perf_event_open": 241,
            "userfaultfd": 282,
            "kexec_load": 104,
            "kexec_file_load": 294,
            "init_module": 105,
            "finit_module": 273,
            "delete_module": 106,
            "mount": 40,
            "umount2": 39,
            "pivot_root": 41,
            "open_tree": 428,
            "move_mount": 429,
            "fsopen": 430,
            "fsconfig": 431,
            "fsmount": 432,
            "fspick": 433,
            "mount_setattr": 442,
            "setns": 268,
            "swapon": 224,
            "swapoff": 225,
            "reboot": 142,
            "acct": 89,
            "quotactl": 60,
            "quotactl_fd": 443,
            "open_by_handle_at": 265,
            "syslog": 116,
            "vhangup": 58,
            "lookup_dcookie": 18,
        },
        {"clone3": 435, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    ),
}
#: Calls whose first argument says whether they make a user namespace.
_MAKERS = {"x86_64": (56, 272), "aarch64": (220, 97)}


@functools.cache
def program(machine: str = "") -> bytes:
    """Return the filter for a processor (by default this host's), b"" for one that is not known.

    :param machine: as ``uname -m`` calls it.
    """
    machine = machine or platform.machine()
    if machine not in _CALLS:
        return b""
    architecture, refused, absent = _CALLS[machine]
    refuse, pretend = _REFUSE | errno.EPERM, _REFUSE | errno.ENOSYS
    # Calls of another architecture (32-bit programs) have other numbers and would slip through: refused.
    head = [_load(_ARCHITECTURE), _jump(_JUMP_EQUAL, architecture, 1, 0), _return(pretend), _load(_NUMBER)]
    body: list[bytes] = []
    if machine == "x86_64":
        body += [_jump(_JUMP_GREATER_EQUAL, _X32, 0, 1), _return(pretend)]
    for number in absent.values():
        body += [_jump(_JUMP_EQUAL, number, 0, 1), _return(pretend)]
    for number in refused.values():
        body += [_jump(_JUMP_EQUAL, number, 0, 1), _return(refuse)]
    for number in _MAKERS[machine]:
        body += [
            _jump(_JUMP_EQUAL, number, 0, 4),
            _load(_FIRST_ARGUMENT),
            _jump(_JUMP_SET, _NEW_USER, 0, 1),
            _return(refuse),
            _return(_ALLOW),
        ]
    return b"".join([*head, *body, _return(_ALLOW)])


def _load(offset: int) -> bytes:
    return struct.pack("<HBBI", _LOAD_WORD, 0, 0, offset)


def _jump(kind: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("<HBBI", kind, if_true, if_false, value)


def _return(value: int) -> bytes:
    return struct.pack("<HBBI", _RETURN, 0, 0, value)
