"""Program: `kvm.py` finds out whether KVM runs machines here, and at the processor's own speed.

There are hosts, virtual ones above all, whose /dev/kvm makes machines that then stand still, or whose instructions
are interpreted one by one: slower by far than QEMU's emulation.  So a machine with one processor counts down from
some millions, which takes a real one a few milliseconds.  A processor that hangs cannot be called back: this is a
program of its own, which who calls it ends after a while.  Standard library only.  Exit code 0 is yes; else it
prints why not.

Constants are those of linux/kvm.h for x86-64; on others it is enough that a machine can be made.
"""

# ruff: noqa: T201 - what it prints is its interface
from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import struct
import sys
import time

SECONDS = 10.0  # after which the caller gives it up
_LONGEST = 0.3  # seconds of processor time; however busy the host is, they do not grow

_CREATE_VM, _VCPU_SIZE, _CREATE_VCPU, _RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
_SET_MEMORY, _GET_SREGS, _SET_SREGS, _SET_REGS = 0x4020AE46, 0x8138AE83, 0x4138AE84, 0x4090AE82
_SREGS_SIZE, _CS_BASE, _CS_SELECTOR = 312, 0, 12  # struct kvm_sregs begins with struct kvm_segment cs
_REGS = 18  # 64-bit words of struct kvm_regs: sixteen registers, rip, rflags
_EXIT_REASON, _HALTED = 8, 5
# In real mode: mov ecx, 4000000; dec ecx; jnz to the dec; hlt.
_CODE = b"\x66\xb9" + (4_000_000).to_bytes(4, "little") + b"\x66\x49\x75\xfc\xf4"


def count_down(machine: int, size: int) -> int:
    """Let a new machine's processor run `_CODE`; return why it stopped.

    :param size: of what the kernel shares about a processor.
    :raises OSError: the kernel refuses something.
    """
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        memory[: len(_CODE)] = _CODE
        place = ctypes.c_char.from_buffer(memory)
        try:
            region = struct.pack("<IIQQQ", 0, 0, 0, mmap.PAGESIZE, ctypes.addressof(place))
            fcntl.ioctl(machine, _SET_MEMORY, region)
            processor = fcntl.ioctl(machine, _CREATE_VCPU, 0)
            try:
                special = bytearray(_SREGS_SIZE)
                fcntl.ioctl(processor, _GET_SREGS, special)
                struct.pack_into("<Q", special, _CS_BASE, 0)
                struct.pack_into("<H", special, _CS_SELECTOR, 0)
                fcntl.ioctl(processor, _SET_SREGS, bytes(special))
                fcntl.ioctl(processor, _SET_REGS, struct.pack(f"<{_REGS}Q", *[0] * (_REGS - 1), 2))
                with mmap.mmap(processor, size) as shared:
                    fcntl.ioctl(processor, _RUN, 0)
                    return int(struct.unpack_from("<I", shared, _EXIT_REASON)[0])
            finally:
                os.close(processor)
        finally:
            del place


def main() -> int:
    """Run the program."""
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        machine = fcntl.ioctl(device, _CREATE_VM, 0)
        if platform.machine() == "x86_64":
            before = time.process_time()
            stopped = count_down(machine, fcntl.ioctl(device, _VCPU_SIZE, 0))
            took = time.process_time() - before
            if stopped != _HALTED:
                print(f"/dev/kvm: a machine's processor stops at once (reason {stopped})")
                return 1
            if took > _LONGEST:
                print(
                    f"/dev/kvm interprets a machine's instructions ({took:.1f} s for what takes some milliseconds)"
                )
                return 1
    except OSError as error:
        print(f"/dev/kvm cannot make a machine: {error.strerror}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
