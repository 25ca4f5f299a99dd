"""A pseudo-terminal for the program to run on, with somebody who types."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time


def on_a_terminal(arguments, environment, keys=(), rows=40, columns=120):
    """Run the program in a child on a pseudo-terminal of its own and return exit code and output."""
    pid, master = pty.fork()
    if pid == 0:
        try:
            # The width is this terminal's: readline (in the C library's environment) and xdist set one of their own.
            inherited = {key: value for key, value in os.environ.items() if key not in {"COLUMNS", "LINES"}}
            own = {**inherited, **environment, "TERM": "xterm"}
            os.execve(sys.executable, [sys.executable, "-m", "dispatcher", *arguments], own)
        finally:
            os._exit(99)
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    output, until, pending = b"", time.monotonic() + 20, list(keys)
    while time.monotonic() < until:
        if select.select([master], [], [], 0.05)[0]:
            try:
                piece = os.read(master, 65536)
            except OSError:
                break
            if not piece:
                break
            output += piece
        elif pending and output.rstrip().endswith((b":", b"]", b"?")):
            os.write(master, pending.pop(0))
    os.close(master)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode().replace("\r\n", "\n")
