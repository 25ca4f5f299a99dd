"""Starting an agent, step by step, so that every step can be undone.

The order matters.  The journal is written first, so that nothing is unknown after the manager was killed.  The log
collector has the output before the app can write.  The new process waits at a gate (bubblewrap's ``--block-fd``,
without bubblewrap a line on standard input) until its limits and its network are in place: the app runs later.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    last_line,
    make_temporary,
    process_stat,
    remove_tree,
)
from dispatcher_subprocess import logs, network, sandbox
from dispatcher_subprocess.errors import failed
from dispatcher_subprocess.host import Host
from dispatcher_subprocess.options import Options, options_of
from dispatcher_subprocess.plan import Plan
from dispatcher_subprocess.processes import procfs, run
from dispatcher_subprocess.processes.cgroups import join
from dispatcher_subprocess.processes.run_record import Journals, Record

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_UNDO = 10.0  # seconds to remove a start that failed
_PIPE = 32768  # bytes that a pipe holds without a reader
_POLL, _SHARE = 0.0005, 0.1  # shortest pause while bubblewrap works, and the pause's share of the time so far
_AGENT_OOM = 100  # agents are killed before the host's own services when memory is short


@dataclass(kw_only=True)
class Start:
    """A start: `prepare`, `spawn`, `confine`, `release` in this order; `undo` after a failure; always `close`.

    :ivar attach: passes the output, and the sockets for DNS, to the log collector.
    """

    spec: AgentSpec
    plan: Plan
    host: Host
    options: Options
    journals: Journals
    secret_files: SecretFiles
    attach: Callable[[Sequence[int], Path], None]
    deadline: Deadline

    def __post_init__(self) -> None:
        """Begin with nothing to undo."""
        self.group = self.host.cgroups.group(self.spec.backend_name)
        self._kept = contextlib.ExitStack()  # descriptors of ours until the end
        self._passed = contextlib.ExitStack()  # those that the agent inherits; our copies would hide its end
        self._inherited: list[int] = []  # of these, the ones beyond the standard streams
        self._spawn: dict[str, Any] = {}
        self._output = self._gate = self._argument_pipe = -1
        self._arguments = b""
        self._line = b"\n"  # what opens the gate
        self._groups: list[Path] = []
        self._names: tuple[int, ...] = ()
        self._record: Record | None = None

    def prepare(self) -> None:
        """Make the group and the descriptors, write the journal."""
        spec, host = self.spec, self.host
        if self.group:
            self.group.kill()  # a leftover process would share the agent's directories with the new one
        clear_run_dir(spec.run_dir)
        if self.group:
            try:
                self._groups = self.group.create(spec.app.limits)
            except OSError as error:
                raise _unlimited(error) from error
        if spec.secrets:
            self.secret_files.write(spec.backend_name, spec.secrets, spec.uid, spec.gid)
        self._output, both = logs.output_pipe(spec.uid, spec.gid)
        self._keep(self._output)
        self._pass(both)
        self._record = self._new_record()
        status = self._pass(self.journals.begin(self._record))
        user: list[str] = []
        if host.own_uid:
            groups = sandbox.groups(options_of(spec.app))
            user = sandbox.become(spec.uid, spec.gid, host.setpriv, groups)
        elif not host.sandboxed and host.setpriv:
            user = [host.setpriv, "--no-new-privs", "--"]
        if host.sandboxed:
            make_temporary(spec.data_dir / os.path.basename(sandbox.TMP), spec.uid, spec.gid, self.deadline)
        plain, loader = sandbox.split_environment(self.plan.variables)
        prepare = self._prepare_sandboxed if host.sandboxed else self._prepare_unsandboxed
        self._spawn = prepare(user, plain, loader, status) | {
            "output": both,
            "inherited": self._inherited,
            "umask": int(options_of(spec.app).umask, 8),
        }

    def _new_record(self) -> Record:
        spec = self.spec
        return Record(
            name=spec.backend_name,
            agent=spec.agent,
            boot=procfs.boot_id(),
            spec_hash=spec.hash,
            uid=spec.uid,
            endpoint=str(self.plan.endpoint),
            owner_uid=spec.uid if self.host.own_uid else os.geteuid(),
            log_dir=str(spec.log_dir),
            run_dir=str(spec.run_dir),
            token=secrets.token_hex(16),
            sandboxed=self.host.sandboxed,
            status=str(self.journals.status_path(spec.backend_name)),
            pipe=os.fstat(self._output).st_ino,
            unseen=self.plan.unseen,
        )

    def _prepare_sandboxed(
        self, user: list[str], plain: dict[str, str], loader: dict[str, str], status: int
    ) -> dict[str, Any]:
        spec, plan, host = self.spec, self.plan, self.host
        assert plan.view is not None
        stdin, credentials = _input_pipe(self._credentials())
        os.close(credentials)
        block, self._gate = os.pipe()
        arguments, self._argument_pipe = os.pipe()
        self._pass(stdin)
        for fd in (block, arguments):
            self._inherit(fd)
        self._inherited.append(status)
        words = sandbox.arguments(
            spec,
            plan.view,
            memory=self._memory,
            privileged=host.privileged,
            own_uid=host.own_uid,
            workdir=plan.workdir,
            secrets=self.secret_files.path(spec.backend_name) if spec.secrets else None,
            loader=loader,
            resolver=network.resolver() if spec.app.network is Network.PRIVATE else b"",
        )
        words += ["--json-status-fd", str(status), "--block-fd", str(block), ""]
        self._arguments = os.fsencode("\0".join(words))
        program = sandbox.with_loader(plan.command, sandbox.ENVIRONMENT) if loader else plan.command
        return {
            "command": [host.bwrap, "--args", str(arguments), "--", *user, *program],
            "environment": plain,
            "stdin": stdin,
        }

    def _prepare_unsandboxed(
        self, user: list[str], plain: dict[str, str], loader: dict[str, str], _: int
    ) -> dict[str, Any]:
        """Without bubblewrap standard input is the gate; the app reads what follows its first line."""
        stdin, self._gate = _input_pipe(b"")
        self._pass(stdin)
        self._line = b"\n" + self._credentials()
        program, environment = self.plan.command, plain
        if not self.host.own_uid:
            environment = plain | loader | {run.TOKEN: self.record.token}
        elif loader:
            program = sandbox.with_loader(program, f"/proc/self/fd/{self._memory(sandbox.loader_script(loader))}")
        return {
            "command": sandbox.gated([*user, *program]),
            "environment": environment,
            "stdin": stdin,
            "cwd": self.plan.workdir,
        }

    def spawn(self) -> None:
        """Start the sandbox in its control group, with its limits; it waits at the gate.

        :raises ProviderError: it does not come up.
        """
        main = run.spawn(**self._spawn)
        self._record = replace(self.record, main=main)
        self._passed.close()
        # bubblewrap forks after it has read its arguments: what is set now holds for all its processes.
        self._join(main.pid)
        limit(main.pid, self._limits(), options_of(self.spec.app).nice)
        if not self.host.sandboxed:
            return
        pipe, self._argument_pipe = self._argument_pipe, -1
        try:
            with os.fdopen(pipe, "wb") as file:
                file.write(self._arguments)
        except OSError as error:
            raise ProviderError("bubblewrap ended at once", why=str(error)) from error
        # bubblewrap reports what it cannot show before the root is in place; later the output is the app's.
        began = time.monotonic()
        while not (self.record.init and self._has_root(self.record.init.pid)):
            pid = 0 if self.record.init else self.record.sandbox_status().get("child-pid", 0)
            if pid and (found := process_stat(pid)):
                self._record = replace(self.record, init=found.process)
            if not main.lives:
                raise ProviderError("bubblewrap ended before the sandbox was made")
            if self.deadline.expired:
                raise DeadlineExceeded("bubblewrap did not make the sandbox in time")
            time.sleep(max(_POLL, _SHARE * (time.monotonic() - began)))

    def _has_root(self, pid: int) -> bool:
        """Whether a process has the sandbox's root already."""
        try:
            return os.path.samefile(f"/proc/{pid}/root{sandbox.RUN}", self.spec.run_dir)
        except PermissionError:  # a security module hides it
            return True
        except FileNotFoundError:
            return False

    @property
    def record(self) -> Record:
        """The journal's content, as far as the start has come."""
        assert self._record is not None
        return self._record

    def _join(self, pid: int) -> None:
        try:
            join(self._groups, pid)
        except ProcessLookupError:
            pass  # it ended; the next step reports why
        except OSError as error:
            raise _unlimited(error) from error

    def confine(self) -> None:
        """Connect the waiting sandbox's network.

        :raises ProviderError: that fails.
        """
        if self.spec.app.network is Network.PRIVATE:
            assert self.record.init is not None
            port = self.plan.endpoint.port
            deny, groups = self.options.deny, self._groups
            helper = network.connect(self.host, self.record.init, port, deny, groups, self.deadline)
            self._record = replace(self.record, helper=helper)
            self._names = network.name_sockets(self.host, self.record.init, self.deadline)
            for fd in self._names:
                self._keep(fd)

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
        self._record = replace(self.record, started_at=time.time())
        self.journals.append(self.spec.backend_name, self._record.fields())
        self.attach([self._output, *self._names], logs.log_file(self.spec.log_dir))
        gate, self._gate = self._gate, -1
        try:
            os.write(gate, self._line)
        except OSError as error:
            raise ProviderError("The sandbox ended before the app began", why=str(error)) from error
        finally:
            os.close(gate)

    def add_output_to(self, error: DispatcherError) -> None:
        """Add bubblewrap's last output to an error."""
        text = ""
        with contextlib.suppress(OSError):  # nothing there
            os.set_blocking(self._output, False)
            text = last_line(os.read(self._output, 65536))
        if text:
            error.why = f"{error.why}; {text}" if error.why else text

    def undo(self) -> None:
        """Remove what a failed start has made.  Closing the gate would let the app begin, so that comes later."""
        self._passed.close()
        name = self.spec.backend_name
        if self._record and self._record.main:
            run.Run(self._record, self.group).kill(Deadline(_UNDO))
            run.reap(self._record.main)
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
        self._passed.close()
        self._kept.close()

    def _credentials(self) -> bytes:
        """Return what the app gets on its standard input."""
        return (self.spec.stdin or b"") if self.spec.app.credentials == "stdin" else b""

    def _keep(self, fd: int) -> None:
        self._kept.callback(os.close, fd)

    def _pass(self, fd: int) -> int:
        self._passed.callback(os.close, fd)
        return fd

    def _inherit(self, fd: int) -> None:
        self._inherited.append(self._pass(fd))

    def _memory(self, content: bytes) -> int:
        """Return an inherited descriptor of a file in memory, at its beginning."""
        fd = os.memfd_create("agent")
        self._inherit(fd)
        os.write(fd, content)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd


def _unlimited(error: OSError) -> ProviderError:
    return failed("Cannot limit the agent: its control group", error, fix="see `dispatcher doctor`")


def clear_run_dir(run_dir: Path) -> None:
    """Remove the content of a run directory, which is in memory; does not follow links.

    :raises ProviderError: something cannot be removed.
    """
    try:
        directory = os.open(run_dir, _DIRECTORY)
        try:
            for name in os.listdir(directory):
                remove_tree(name, dir_fd=directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise failed(f"Cannot clear {run_dir}", error, fix="check its content, and remove it by hand") from error


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
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(_AGENT_OOM), encoding="ascii")


def _limit(pid: int, kind: int, value: int) -> None:
    """Set one limit, or the present hard limit if that is lower and cannot be raised."""
    try:
        resource.prlimit(pid, kind, (value, value))
    except PermissionError:
        hard = resource.prlimit(pid, kind)[1]
        if hard == resource.RLIM_INFINITY or hard >= value:
            raise
        resource.prlimit(pid, kind, (hard, hard))
