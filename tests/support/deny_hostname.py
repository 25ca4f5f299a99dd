"""Run a command as systemd does under `ProtectHostname=yes`: sethostname and setdomainname fail with EPERM.

Usage: deny_hostname.py COMMAND...  (x86_64 only, as the tests' machines are)
"""

import ctypes
import errno
import os
import struct
import sys

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
ALLOW, DENY = 0x7FFF0000, 0x00050000 | errno.EPERM
SETHOSTNAME, SETDOMAINNAME = 170, 171

FILTER = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (LOAD, 0, 0, 0),  # the number of the system call
        (EQUAL, 1, 0, SETHOSTNAME),
        (EQUAL, 0, 1, SETDOMAINNAME),
        (RETURN, 0, 0, DENY),
        (RETURN, 0, 0, ALLOW),
    )
)


class Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


libc = ctypes.CDLL(None, use_errno=True)
program = Program(len(FILTER) // 8, FILTER)
if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
    sys.exit(f"no seccomp filter: {os.strerror(ctypes.get_errno())}")
os.execvp(sys.argv[1], sys.argv[1:])
