"""Starting an agent, step by step, so that every step can be undone.

The order matters.  The journal is written first, so that nothing is unknown after the manager was killed.  The log
collector has the output before the app can write.  The new process waits at a gate (bubblewrap's ``--block-fd``,
without bubblewrap a line on standard input) until its limits and its network are in place: the app runs later.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dispatcher.plugin import (
    AgentSpec,
    Deadline,
    DeadlineExceeded,
    DispatcherError,
    Network,
    ProviderError,
    SecretFiles,
)
from dispatcher_subprocess import logs, network, processes, procfs, sandbox, seccomp
from dispatcher_subprocess.cgroups import join
from dispatcher_subprocess.errors import failed
from dispatcher_subprocess.host import Host
from dispatcher_subprocess.journal import Journals, Process
from dispatcher_subprocess.options import Options, options_of
from dispatcher_subprocess.plan import Plan

_UNDO = 10.0  # seconds to remove a start that failed
_PIPE = 32768  # bytes that a pipe holds without a reader
_AGENT_OOM = 100  # agents are killed before the host's own services when memory is short


class Start:
    """A start: `prepare`, `spawn`, `confine`, `release` in this order; `undo` after a failure; always `close`."""

    def __init__(
        self,
        spec: AgentSpec,
        plan: Plan,
        *,
        host: Host,
        options: Options,
        journals: Journals,
        secret_files: SecretFiles,
        attach: Callable[[int, Path], None],
        deadline: Deadline,
    ) -> None:
        self.spec = spec
        self.plan = plan
        self.host = host
        self.options = options
        self.journals = journals
        self.secret_files = secret_files
        self.attach = attach
        self.deadline = deadline
        self.group = host.cgroups.group(spec.backend_name)
        self.token = secrets.token_hex(16)
        self._kept = contextlib.ExitStack()  # descriptors of ours until the end
        self._passed = contextlib.ExitStack()  # those that the agent inherits; our copies would hide its end
        self._spawn: dict[str, Any] = {}
        self._output = self._info = self._gate = self._argument_pipe = -1
        self._arguments = b""
        self._line = b"\n"  # what opens the gate
        self._groups: list[Path] = []
        self._main: Process | None = None
        self._inner: Process | None = None
        self._pidns = 0
        self._helper: Process | None = None

    def prepare(self) -> None:
        """Make the group and the descriptors, write the journal."""
        spec = self.spec
        clear_run_dir(spec.run_dir)
        if self.group:
            self.group.kill()  # a leftover process would share the data directory with the new one
            try:
                self._groups = self.group.create(spec.app.limits)
            except OSError as error:
                raise self._unlimited(error) from error
        if spec.secrets:
            self.secret_files.write(spec.backend_name, spec.secrets, spec.uid, spec.gid)
        self._output, both = logs.output_pipe(spec.uid, spec.gid)
        self._keep(self._output)
        self._pass(both)
        status = self._pass(self.journals.begin(self._first_line()))
        user = []
        if self.host.own_uid:
            user = sandbox.become(spec.uid, spec.gid, self.host.setpriv)
        elif not self.host.sandboxed and self.host.setpriv:
            user = [self.host.setpriv, "--no-new-privs", "--"]
        plain, loader = sandbox.split_environment(self.plan.variables)
        if self.host.sandboxed:
            self._prepare_sandboxed(user, plain, loader, status)
        else:
            self._prepare_unsandboxed(user, plain, loader)
        self._spawn |= {"output": both, "umask": int(options_of(spec.app).umask, 8)}

    def _first_line(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "name": spec.backend_name,
            "agent": spec.agent,
            "boot": procfs.boot_id(),
            "spec_hash": spec.hash,
            "uid": spec.uid,
            "endpoint": str(self.plan.endpoint),
            "owner_uid": spec.uid if self.host.own_uid else os.geteuid(),
            "log_dir": str(spec.log_dir),
            "run_dir": str(spec.run_dir),
            "token": self.token,
            "network": spec.app.network.value,
            "sandboxed": self.host.sandboxed,
            "pipe": os.fstat(self._output).st_ino,
        }

    def _prepare_sandboxed(
        self, user: list[str], plain: dict[str, str], loader: dict[str, str], status: int
    ) -> None:
        spec, plan = self.spec, self.plan
        assert plan.view is not None
        stdin, credentials = _input_pipe(self._credentials())
        os.close(credentials)
        block, self._gate = os.pipe()
        self._info, info = os.pipe()
        self._keep(self._info)
        self._pass(stdin, block, info)
        script = self._memory(sandbox.loader_script(loader)) if loader else None
        resolver = self._memory(network.resolver(self.host)) if spec.app.network is Network.PRIVATE else None
        accounts = [self._memory(text) for text in sandbox.accounts(spec)] if self.host.own_uid else []
        filter_program = seccomp.program() if options_of(spec.app).seccomp else b""
        filtered = self._memory(filter_program) if filter_program else None
        words = sandbox.bubblewrap_arguments(
            spec,
            plan.view,
            descriptors=sandbox.Descriptors(
                status=status,
                info=info,
                block=block,
                accounts=accounts,
                seccomp=filtered,
                loader=script,
                resolver=resolver,
            ),
            own_user=not self.host.privileged,
            workdir=plan.workdir,
            secrets=self.secret_files.path(spec.backend_name) if spec.secrets else None,
        )
        self._arguments = os.fsencode("\0".join([*words, ""]))
        arguments, self._argument_pipe = os.pipe()
        self._pass(arguments)
        program = sandbox.with_loader(plan.command, sandbox.ENVIRONMENT) if loader else plan.command
        self._spawn = {
            "command": [self.host.bwrap, "--args", str(arguments), "--", *user, *program],
            "environment": plain,
            "stdin": stdin,
            "inherited": [
                status,
                info,
                block,
                arguments,
                *accounts,
                *(fd for fd in (script, resolver, filtered) if fd is not None),
            ],
            "cwd": "/",
        }

    def _prepare_unsandboxed(self, user: list[str], plain: dict[str, str], loader: dict[str, str]) -> None:
        """Without bubblewrap standard input is the gate; the app reads what follows its first line."""
        plan = self.plan
        stdin, self._gate = _input_pipe(b"")
        self._pass(stdin)
        self._line = b"\n" + self._credentials()
        inherited, program, environment = [], plan.command, plain
        if self.host.own_uid and loader:
            inherited = [self._memory(sandbox.loader_script(loader))]
            program = sandbox.with_loader(program, f"/proc/self/fd/{inherited[0]}")
        if not self.host.own_uid:
            environment = plain | loader | {processes.TOKEN: self.token}
        self._spawn = {
            "command": sandbox.gated([*user, *program]),
            "environment": environment,
            "stdin": stdin,
            "inherited": inherited,
            "cwd": plan.workdir,
        }

    def spawn(self) -> None:
        """Start the sandbox in its control group, with its limits; it waits at the gate.

        :raises ProviderError: it does not come up.
        """
        self._main = self._inner = processes.spawn(**self._spawn)
        self._passed.close()
        # bubblewrap forks after it has read its arguments: what is set now holds for all its processes.
        self._join(self._main.pid)
        limit(self._main.pid, self._limits(), options_of(self.spec.app).nice)
        if not self.host.sandboxed:
            return
        self._send_arguments()
        pid, self._pidns = _read_info(self._info, self.deadline)
        found = procfs.stat(pid)
        if not found:
            raise ProviderError("bubblewrap ended before the sandbox was made")
        self._inner = Process(pid=pid, start=found.start)

    def _send_arguments(self) -> None:
        pipe, self._argument_pipe = self._argument_pipe, -1
        try:
            with os.fdopen(pipe, "wb", closefd=True) as file:
                file.write(self._arguments)
        except OSError as error:
            raise ProviderError("bubblewrap ended at once", why=str(error)) from error

    def _join(self, pid: int) -> None:
        try:
            join(self._groups, pid)
        except ProcessLookupError:
            pass  # it ended; the next step reports why
        except OSError as error:
            raise self._unlimited(error) from error

    def confine(self) -> None:
        """Connect the waiting sandbox's network.

        :raises ProviderError: that fails.
        """
        assert self._inner is not None
        if self.spec.app.network is Network.PRIVATE:
            self._helper = network.connect(
                self.host, self._inner, self.plan.inside.port, self.options.deny, self.deadline
            )
            self._join(self._helper.pid)

    def _limits(self) -> dict[int, int | None]:
        """Return the resource limits, which also stand in for missing controllers."""
        options, wanted = options_of(self.spec.app), self.spec.app.limits
        return {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NOFILE: options.nofile,
            resource.RLIMIT_FSIZE: options.file_size,
            resource.RLIMIT_DATA: None if self.host.cgroups.limits("memory") else wanted.memory,
            # Counted per user id: right only where the agent has one of its own.
            resource.RLIMIT_NPROC: wanted.pids if self.host.own_uid else None,
        }

    def release(self) -> None:
        """Record that it runs, pass its output to the log collector, open the gate.

        :raises ProviderError: it has ended already.
        """
        assert self._main is not None
        started: dict[str, Any] = {"main": asdict(self._main), "started_at": time.time(), "pidns": self._pidns}
        if self.host.sandboxed:
            started["init"] = asdict(self._inner) if self._inner else None
        if self._helper:
            started["helper"] = asdict(self._helper)
        self.journals.append(self.spec.backend_name, started)
        self.attach(self._output, logs.log_file(self.spec.log_dir))
        gate, self._gate = self._gate, -1
        try:
            os.write(gate, self._line)
        except OSError as error:
            raise ProviderError("The sandbox ended before the app began", why=str(error)) from error
        finally:
            os.close(gate)

    def add_output_to(self, error: DispatcherError) -> None:
        """Add bubblewrap's last output to an error."""
        text = _drain(self._output) if self._output >= 0 else ""
        if text:
            error.why = f"{error.why}; {text}" if error.why else text

    def undo(self) -> None:
        """Remove what a failed start has made.  Closing the gate would let the app begin, so that comes later."""
        self._passed.close()
        name = self.spec.backend_name
        undo_by = Deadline(_UNDO)
        record = self.journals.read(name)
        if record and self._main:
            init = self._inner if self.host.sandboxed and self._inner is not self._main else None
            record = replace(record, main=self._main, init=init, helper=self._helper)
            processes.kill(record, self.group, lambda: undo_by.expired)
            processes.reap(self._main)
        if self.group:
            self.group.remove()
        self.secret_files.remove(name)
        self.journals.remove(name)
        with contextlib.suppress(ProviderError):
            clear_run_dir(self.spec.run_dir)

    def close(self) -> None:
        """Close all descriptors."""
        for fd in (self._gate, self._argument_pipe):
            if fd >= 0:
                os.close(fd)
        self._gate = self._argument_pipe = -1
        self._passed.close()
        self._kept.close()

    def _credentials(self) -> bytes:
        """Return what the app gets on its standard input."""
        return (self.spec.stdin or b"") if self.spec.app.credentials == "stdin" else b""

    def _keep(self, fd: int) -> None:
        self._kept.callback(os.close, fd)

    def _pass(self, *fds: int) -> int:
        for fd in fds:
            self._passed.callback(os.close, fd)
        return fds[0]

    def _memory(self, content: bytes) -> int:
        return self._pass(_memory_file("agent", content))

    def _unlimited(self, error: OSError) -> ProviderError:
        return ProviderError(
            "Cannot limit the agent", why=f"its control group: {error}", fix="see `dispatcher doctor`"
        )


def clear_run_dir(run_dir: Path) -> None:
    """Remove the content of a run directory, which is in memory; does not follow links.

    :raises ProviderError: something cannot be removed.
    """
    try:
        directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name in os.listdir(directory):
                try:
                    os.unlink(name, dir_fd=directory)
                except IsADirectoryError:
                    shutil.rmtree(f"/proc/self/fd/{directory}/{name}")
        finally:
            os.close(directory)
    except OSError as error:
        raise failed(f"Cannot clear {run_dir}", error, fix="check its content, and remove it by hand") from error


def _memory_file(name: str, content: bytes) -> int:
    """Return the descriptor of a file in memory, at its beginning."""
    fd = os.memfd_create(name)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _input_pipe(content: bytes) -> tuple[int, int]:
    """Return a pipe's read end for standard input, and its write end, with `content` written.

    :raises ProviderError: it is too long.
    """
    if len(content) > _PIPE:
        raise ProviderError("The credentials are too long", why=f"{len(content)} bytes, the limit is {_PIPE}")
    read_end, write_end = os.pipe()
    if content:
        os.write(write_end, content)
    return read_end, write_end


def _read_info(fd: int, deadline: Deadline) -> tuple[int, int]:
    """Return the pid of the sandbox's init and the inode of its pid namespace, from bubblewrap's ``--info-fd``.

    :raises ProviderError: bubblewrap ended before; :raises DeadlineExceeded: it did not write in time.
    """
    text = b""
    while True:
        if not processes.wait_readable(fd, deadline):
            raise DeadlineExceeded("bubblewrap did not make the sandbox in time")
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        text += chunk
    try:
        info = json.loads(text)
        return int(info["child-pid"]), int(info.get("pid-namespace", 0))
    except (ValueError, KeyError) as error:
        raise ProviderError("bubblewrap ended before the sandbox was made") from error


def limit(pid: int, limits: Mapping[int, int | None], nice: int) -> None:
    """Set resource limits (soft and hard; None keeps one) and priority of a waiting process.

    Without the right to raise a hard limit (an ordinary user, root in many containers) that limit is used where it
    is lower than the app's.

    :raises ProviderError: the kernel refuses.
    """
    try:
        for kind, value in limits.items():
            if value is not None:
                _limit(pid, kind, value)
        if nice:
            os.setpriority(os.PRIO_PROCESS, pid, nice)
    except OSError as error:
        raise failed(
            "Cannot limit the agent",
            error,
            fix="give the manager CAP_SYS_RESOURCE and CAP_SYS_NICE (a container: --cap-add)",
        ) from error
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(_AGENT_OOM).encode())
        finally:
            os.close(fd)


def _limit(pid: int, kind: int, value: int) -> None:
    """Set one limit, or the present hard limit if that is lower and cannot be raised."""
    try:
        resource.prlimit(pid, kind, (value, value))
    except PermissionError:
        hard = resource.prlimit(pid, kind)[1]
        if hard == resource.RLIM_INFINITY or hard >= value:
            raise
        resource.prlimit(pid, kind, (hard, hard))


def _drain(fd: int) -> str:
    """Return the last line of what a pipe holds, safe to print."""
    os.set_blocking(fd, False)
    try:
        text = os.read(fd, 65536)
    except OSError:
        return ""
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return "".join(char if char.isprintable() else "?" for char in lines[-1])[:500] if lines else ""
