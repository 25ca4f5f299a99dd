"""A seccomp profile for containers: system calls of ordinary apps, and sockets of the families that stay inside.

Container runtimes and engines take it as JSON.  Before Docker 23 the engine's own profile lets AF_VSOCK pass,
which no network namespace separates: its addresses are one space for all agents, the host and its virtual
machines.  Here only listed families pass.  Also refused are kernel keys, BPF, performance counters, namespaces,
mounts, modules, io_uring, libaio, 32-bit programs, kernel memory that no limit counts (`system_calls`) and what
would leave the quota of the data directory.
"""

from __future__ import annotations

import errno
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from dispatcher.plugin import system_calls

#: AF_UNIX, AF_INET, AF_INET6, AF_NETLINK.
FAMILIES = (1, 2, 10, 16)
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
#: Low halves of FS_IOC_FSSETXATTR and FS_IOC_SETFLAGS: the owner of a file may change its project.
_QUOTA_IOCTLS = (0x5820, 0x6602)
_SOL_SOCKET = 1
_SHORT = 0xFFFF  # mask of numbers of 16 bits
_NEW_NAMESPACES = 0x7E020000  # the flags CLONE_NEW* of clone(2)
#: Refused with ENOSYS, so that programs fall back to older calls.
_ABSENT = ["clone3", "io_setup", "io_uring_setup", "io_uring_enter", "io_uring_register"]
#: More calls for those that have a capability.
_PRIVILEGED = {
    "SYS_ADMIN": "fsconfig fsmount fsopen fspick mount mount_setattr move_mount open_tree pivot_root quotactl "
    "quotactl_fd setdomainname sethostname setns syslog umount2 unshare",
    "SYS_CHROOT": "chroot",
    "SYS_NICE": "get_mempolicy mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node",
    "SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "SYS_TIME": "clock_settime settimeofday",
}
_ALLOWED = """
    accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset chdir chmod chown
    clock_adjtime clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range creat dup
    dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait
    epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate
    fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchownat fdatasync fgetxattr flistxattr flock
    fork fremovexattr fstat fstatfs fsync ftruncate futex futex_requeue futex_wait futex_waitv
    futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid geteuid
    getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid
    getresuid getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getxattr getxattrat
    inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents
    io_pgetevents io_submit ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset
    landlock_restrict_self lchown lgetxattr link linkat listen listxattr listxattrat llistxattr lremovexattr
    lseek lsm_get_self_attr lsm_list_modules lstat madvise map_shadow_stack membarrier
    memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall modify_ldt mprotect
    mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap mseal msgctl msgget msgrcv
    msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat open openat openat2 pause
    pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect prctl pread64 preadv
    preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev ptrace pwrite64 pwritev
    pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr
    removexattrat rename renameat renameat2 restart_syscall riscv_flush_icache riscv_hwprobe rmdir rseq
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
    sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam
    sched_setscheduler sched_yield seccomp semctl semget semop semtimedop sendfile sendmmsg sendmsg
    sendto set_robust_list set_thread_area set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid
    setpriority setregid setresgid setresuid setreuid setrlimit setsid setuid
    shmat shmctl shmdt shutdown sigaltstack signalfd signalfd4 splice stat statfs statx symlink symlinkat
    sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime
    timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask uname unlink
    unlinkat utime utimensat utimes vfork vmsplice wait4 waitid write writev
"""


@functools.cache
def seccomp_profile(capabilities: frozenset[str] = frozenset(), *, multicast: bool = False) -> str:
    """Return the profile as JSON: ``linux.seccomp`` of a bundle's config.json, or what a container engine takes.

    Rules for one call never overlap: which of two answers counts would depend on libseccomp's version.

    :param capabilities: of the container, without ``CAP_``; they allow more calls.
    :param multicast: membership in multicast groups is allowed.
    """
    names = _ALLOWED.split()
    for capability in sorted(capabilities):
        names += _PRIVILEGED.get(capability, "").split()
    namespaces = 0 if "SYS_ADMIN" in capabilities else _NEW_NAMESPACES
    files, thread = system_calls.CLONE_FILES, system_calls.CLONE_THREAD
    rules = [
        _rule(names),
        _rule(["clone"], _masked(0, namespaces | files, 0)),
        _rule(["clone"], _masked(0, namespaces | thread, thread)),
        *(_rule(["personality"], _argument("EQ", value)) for value in _PERSONALITIES),
        *(rule for family in FAMILIES for rule in _sockets(family)),
        *(_rule(["ioctl"], _masked(1, mask, value)) for mask, value in all_but(_QUOTA_IOCTLS)),
        *_options(multicast=multicast),
        *_memory(),
        _rule(_ABSENT, error=errno.ENOSYS),
        _rule(list(system_calls.ATTRIBUTES), error=system_calls.ATTRIBUTE_ERROR),
    ]
    return json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules})


def _sockets(family: int) -> Iterator[dict[str, Any]]:
    """Yield the rules of socket(2) and socketpair(2) for a family."""
    calls, of_family = ["socket", "socketpair"], _argument("EQ", family)
    protocols = system_calls.PROTOCOLS.values()
    yield from (_rule(calls, of_family, _masked(2, mask, value)) for mask, value in all_but(protocols))
    for one in protocols:
        yield _rule(calls, of_family, _masked(2, _SHORT, one), error=system_calls.PROTOCOL_ERROR)


def _options(*, multicast: bool) -> Iterator[dict[str, Any]]:
    """Yield the rules of setsockopt(2)."""
    call, with_error = ["setsockopt"], system_calls.refused_options(multicast=multicast)
    refused = {_SOL_SOCKET: frozenset(system_calls.SOCKET_FILTERS.values()), **with_error}
    yield from (_rule(call, _masked(1, mask, value)) for mask, value in all_but(refused))
    for level, options in refused.items():
        of_level = _masked(1, _SHORT, level)
        yield from (_rule(call, of_level, _masked(2, mask, value)) for mask, value in all_but(options))
    for level, options in with_error.items():
        of_level = _masked(1, _SHORT, level)
        yield from (
            _rule(call, of_level, _masked(2, _SHORT, option), error=system_calls.OPTION_ERROR)
            for option in sorted(options)
        )


def _memory() -> Iterator[dict[str, Any]]:
    """Yield the rules of other calls that take kernel memory."""
    locks = system_calls.FILE_LOCKS.values()
    yield from (_rule(["fcntl"], _masked(1, mask, value)) for mask, value in all_but(locks))
    yield from (_rule(["fcntl"], _masked(1, _SHORT, one), error=system_calls.LOCK_ERROR) for one in locks)
    for name, position in system_calls.WAITS.items():
        yield _rule([name], _argument("LE", system_calls.MOST_WAITED, index=position))
        yield _rule(
            [name],
            _argument("GT", system_calls.MOST_WAITED, index=position),
            error=system_calls.WAIT_ERROR,
        )
    for name, (position, flag, error) in system_calls.HUGE_PAGES.items():
        yield _rule([name], _masked(position, flag, 0))
        yield _rule([name], _masked(position, flag, flag), error=error)


def _rule(names: list[str], *arguments: dict[str, Any], error: int = 0) -> dict[str, Any]:
    answer = {"action": "SCMP_ACT_ERRNO", "errnoRet": error} if error else {"action": "SCMP_ACT_ALLOW"}
    return {"names": names, "args": list(arguments), **answer}


def _argument(comparison: str, value: int, value_two: int = 0, *, index: int = 0) -> dict[str, Any]:
    return {"index": index, "value": value, "valueTwo": value_two, "op": f"SCMP_CMP_{comparison}"}


def _masked(index: int, mask: int, value: int) -> dict[str, Any]:
    """Compare those bits of an argument that are in a mask."""
    return _argument("MASKED_EQ", mask, value, index=index)


def all_but(refused: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield masks and values that together match each number of 16 bits but those."""
    refused, mask = list(refused), 0
    for bit in reversed([1 << position for position in range(16)]):
        prefixes = {each & mask for each in refused}
        mask |= bit
        taken = {each & mask for each in refused}
        for prefix in sorted(prefixes):
            yield from ((mask, value) for value in (prefix, prefix | bit) if value not in taken)
