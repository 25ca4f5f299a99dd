"""Arguments of system calls that take kernel memory or tables that no control group counts; the error for each.

Providers whose agents share the host's kernel refuse them by a filter of system calls.  Numbers are those of
x86-64 and aarch64; the kernel reads 32 bits of each argument.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping

#: Filters of sockets: refused with EPERM.
SOCKET_FILTERS = {"SO_ATTACH_FILTER": 26, "SO_ATTACH_BPF": 50, "SO_ATTACH_REUSEPORT_CBPF": 51}

_JOIN = {"MCAST_JOIN_GROUP": 42, "MCAST_BLOCK_SOURCE": 43, "MCAST_JOIN_SOURCE_GROUP": 46, "MCAST_MSFILTER": 48}
#: Level -> options, which take up to `net.core.optmem_max` a socket, or of the flow labels of all namespaces.
OPTIONS: Mapping[int, Mapping[str, int]] = {
    socket.IPPROTO_TCP: {"TCP_MD5SIG": 14, "TCP_MD5SIG_EXT": 32, "TCP_AO_ADD_KEY": 38},
    socket.IPPROTO_IPV6: {"IPV6_2292PKTOPTIONS": 6, "IPV6_FLOWLABEL_MGR": 32, "IPV6_RTHDR": 57},
}
#: The same, for membership in multicast groups, which apps in the host's network may need.
MULTICAST: Mapping[int, Mapping[str, int]] = {
    socket.IPPROTO_IP: {
        "IP_ADD_MEMBERSHIP": 35,
        "IP_BLOCK_SOURCE": 38,
        "IP_ADD_SOURCE_MEMBERSHIP": 39,
        "IP_MSFILTER": 41,
        **_JOIN,
    },
    socket.IPPROTO_IPV6: {"IPV6_ADD_MEMBERSHIP": 20, **_JOIN},
}
#: As a kernel without the option answers; zeroconf, among others, goes on.
OPTION_ERROR = errno.ENOPROTOOPT

#: Protocols of socket(2) whose memory no control group counts and no list tells; the kernel may load modules for
#: them.  The error is that of a kernel without them: servers that try MPTCP first, as those in Go, then use TCP.
PROTOCOLS = {
    "IPPROTO_DCCP": 33,
    "IPPROTO_L2TP": 115,
    "IPPROTO_SCTP": 132,
    "IPPROTO_SMC": 256,
    "IPPROTO_MPTCP": 262,
}
PROTOCOL_ERROR = errno.EPROTONOSUPPORT

#: Call -> position of the number of descriptors.  Each takes up to 128 bytes until the call returns.
WAITS = {"poll": 1, "ppoll": 1, "select": 0, "pselect6": 0}
#: The largest such number.  poll(2) documents the error for numbers above RLIMIT_NOFILE.
MOST_WAITED, WAIT_ERROR = 1024, errno.EINVAL

#: Commands of fcntl(2) for locks that belong to an open file: they name no process, so who has them is unknown.
#: Programs that look for them use locks of processes where F_OFD_GETLK gives this error, as before Linux 3.15.
FILE_LOCKS = {"F_OFD_GETLK": 36, "F_OFD_SETLK": 37, "F_OFD_SETLKW": 38}
LOCK_ERROR = errno.EINVAL
#: Flags of clone(2).  A process, other than a thread, that shares its open files could leave locks when it ends:
#: the kernel would name a process that is gone.
CLONE_FILES, CLONE_THREAD = 0x400, 0x10000

#: Calls that set extended attributes: an access list takes up to 64 KiB a file, 128 a directory, also on a tmpfs.
#: Programs that copy files, as cp and tar do, go on with this error, as on a file system without attributes.
ATTRIBUTES, ATTRIBUTE_ERROR = ("setxattr", "lsetxattr", "fsetxattr", "setxattrat"), errno.EOPNOTSUPP

#: Call -> position of its flags, the flag for pages of `vm.nr_hugepages`, which the host reserved for others, and
#: the error.  Chromium calls memfd_create(2) with all flags and expects EINVAL.
HUGE_PAGES = {
    "mmap": (3, 0x40000, errno.ENOMEM),
    "memfd_create": (1, 0x4, errno.EINVAL),
    "shmget": (2, 0o4000, errno.ENOMEM),
}


def refused_options(*, multicast: bool) -> dict[int, frozenset[int]]:
    """Return the options that are refused with `OPTION_ERROR`, by level.

    :param multicast: membership in multicast groups is allowed, for apps in the host's network.
    """
    tables = [OPTIONS] if multicast else [OPTIONS, MULTICAST]
    return {
        level: frozenset(number for table in tables for number in table.get(level, {}).values())
        for level in sorted({level for table in tables for level in table})
    }
