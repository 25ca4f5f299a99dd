#!/usr/bin/env python3
"""Chromium to which the host's network never changes.  Its arguments are Chromium's.

Chromium gives up all requests when an interface of the host gets an address, and containers and guests of other tests
have interfaces of their own.  It hears of them by a netlink socket, which a system call filter refuses here; what it
starts inherits the filter.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

CHROMIUM = "/usr/bin/chromium"
AF_NETLINK = 16
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
SOCKET = {"x86_64": 41, "aarch64": 198}  # the number of socket(2)
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # of a 32-bit word; with a constant; a constant
NUMBER, FIRST_ARGUMENT = 0, 16  # in struct seccomp_data


def refuse_netlink() -> None:
    """Let socket(AF_NETLINK) fail from now on.

    :raises OSError: the kernel has no system call filters.
    """
    rules = [
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_EQUAL, 0, 3, SOCKET[platform.machine()]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_IF_EQUAL, 0, 1, AF_NETLINK),
        (RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0),
    ):
        if libc.prctl(*map(ctypes.c_ulong, arguments)):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    refuse_netlink()
    os.execv(CHROMIUM, [CHROMIUM, *sys.argv[1:]])
