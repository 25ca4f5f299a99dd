"""One start of an agent, step by step, so that it can be undone at any of them.

The order matters: the journal is written first, so that a manager killed in the middle leaves nothing unknown; the
log pump has the output before the app can write; the app begins last, when its limits and its network stand.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dispatcher.plugin import AgentSpec, Deadline, DispatcherError, Network, ProviderError
from dispatcher_subprocess import launch, network, processes, procfs, pumping, sandbox, seccomp
from dispatcher_subprocess.cgroups import Group, join
from dispatcher_subprocess.machine import Machine
from dispatcher_subprocess.options import Options, options_of
from dispatcher_subprocess.output import log_file
from dispatcher_subprocess.planning import Plan
from dispatcher_subprocess.record import Journals, Process
from dispatcher_subprocess.secretfiles import SecretFiles

_UNDO = 10.0  # seconds to get rid of a start that failed


class Attempt:
    """A start: `prepare`, `spawn`, `confine`, `release` in this order; `undo` after a failure; always `close`."""

    def __init__(
        self,
        spec: AgentSpec,
        plan: Plan,
        *,
        machine: Machine,
        options: Options,
        journals: Journals,
        secret_files: SecretFiles,
        attach: Callable[[int, Path], None],
        deadline: Deadline,
    ) -> None:
        self.spec = spec
        self.plan = plan
        self.machine = machine
        self.options = options
        self.journals = journals
        self.secret_files = secret_files
        self.attach = attach
        self.deadline = deadline
        self.group: Group | None = None
        if machine.cgroups.usable:
            self.group = machine.cgroups.group(spec.backend_name)
        self.token = secrets.token_hex(16)
        self._kept = contextlib.ExitStack()  # descriptors of ours until the end
        self._passed = contextlib.ExitStack()  # those that the agent inherits; our copies would hide its end
        self._launch: dict[str, Any] = {}
        self._output = self._info = self._gate = self._speaker = -1
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
            self.group.kill()  # nothing should be there; if it is, two agents would share one data directory
            try:
                self._groups = self.group.create(spec.app.limits)
            except OSError as error:
                raise self._unlimited(error) from error
        if spec.secrets:
            self.secret_files.write(spec.backend_name, spec.secrets, spec.uid, spec.gid)
        self._output, both = pumping.output_pipe(spec.uid, spec.gid)
        self._keep(self._output)
        self._pass(both)
        status = self._pass(self.journals.begin(self._first_line()))
        user = []
        if self.machine.own_uid:
            user = sandbox.become(spec.uid, spec.gid, self.machine.setpriv)
        elif not self.machine.sandboxed and self.machine.setpriv:
            user = [self.machine.setpriv, "--no-new-privs", "--"]
        plain, loader = sandbox.split_environment(self.plan.variables)
        if self.machine.sandboxed:
            self._prepare_walled(user, plain, loader, status)
        else:
            self._prepare_open(user, plain, loader)
        self._launch |= {"output": both, "umask": int(options_of(spec.app).umask, 8)}

    def _first_line(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "name": spec.backend_name,
            "agent": spec.agent,
            "boot": procfs.boot_id(),
            "spec_hash": spec.hash,
            "uid": spec.uid,
            "endpoint": str(self.plan.endpoint),
            "owner_uid": spec.uid if self.machine.own_uid else os.geteuid(),
            "log_dir": str(spec.log_dir),
            "run_dir": str(spec.run_dir),
            "token": self.token,
            "network": spec.app.network.value,
            "sandboxed": self.machine.sandboxed,
            "pipe": os.fstat(self._output).st_ino,
        }

    def _prepare_walled(self, user: list[str], plain: dict[str, str], loader: dict[str, str], status: int) -> None:
        spec, plan = self.spec, self.plan
        assert plan.view is not None
        stdin, credentials = launch.input_pipe(self._credentials())
        os.close(credentials)
        block, self._gate = os.pipe()
        self._info, told = os.pipe()
        self._keep(self._info)
        self._pass(stdin, block, told)
        script = self._memory(sandbox.loader_script(loader)) if loader else None
        resolver = self._memory(network.resolver(self.machine)) if spec.app.network is Network.PRIVATE else None
        accounts = [self._memory(text) for text in sandbox.accounts(spec)] if self.machine.own_uid else []
        calls = seccomp.program() if options_of(spec.app).seccomp else b""
        refused = self._memory(calls) if calls else None
        words = sandbox.bubblewrap_arguments(
            spec,
            plan.view,
            descriptors=sandbox.Descriptors(
                status=status,
                info=told,
                block=block,
                accounts=accounts,
                seccomp=refused,
                loader=script,
                resolver=resolver,
            ),
            own_user=not self.machine.privileged,
            workdir=plan.workdir,
            secrets=self.secret_files.path(spec.backend_name) if spec.secrets else None,
        )
        self._arguments = os.fsencode("\0".join([*words, ""]))
        arguments, self._speaker = os.pipe()
        self._pass(arguments)
        program = sandbox.with_loader(plan.command, sandbox.ENVIRONMENT) if loader else plan.command
        self._launch = {
            "command": [self.machine.bwrap, "--args", str(arguments), "--", *user, *program],
            "environment": plain,
            "stdin": stdin,
            "inherited": [
                status,
                told,
                block,
                arguments,
                *accounts,
                *(fd for fd in (script, resolver, refused) if fd is not None),
            ],
            "cwd": "/",
        }

    def _prepare_open(self, user: list[str], plain: dict[str, str], loader: dict[str, str]) -> None:
        """Without bubblewrap: standard input is the gate, and what follows its first line is the app's own."""
        plan = self.plan
        stdin, self._gate = launch.input_pipe(b"")
        self._pass(stdin)
        self._line = b"\n" + self._credentials()
        inherited, program, environment = [], plan.command, plain
        if self.machine.own_uid and loader:
            inherited = [self._memory(sandbox.loader_script(loader))]
            program = sandbox.with_loader(program, f"/proc/self/fd/{inherited[0]}")
        if not self.machine.own_uid:
            environment = plain | loader | {processes.TOKEN: self.token}
        self._launch = {
            "command": sandbox.gated([*user, *program]),
            "environment": environment,
            "stdin": stdin,
            "inherited": inherited,
            "cwd": plan.workdir,
        }

    def spawn(self) -> None:
        """Start the sandbox, in its control group and within its limits; it waits at the gate.

        :raises ProviderError: it does not come up.
        """
        self._main = self._inner = launch.spawn(**self._launch)
        self._passed.close()
        # bubblewrap waits for its arguments, and forks only then: what is set now holds for all of them.
        self._join(self._main.pid)
        launch.limit(self._main.pid, self._limits(), options_of(self.spec.app).nice)
        if not self.machine.sandboxed:
            return
        self._speak()
        pid, self._pidns = launch.read_info(self._info, self.deadline)
        found = procfs.stat(pid)
        if not found:
            raise ProviderError("bubblewrap ended before the sandbox was made")
        self._inner = Process(pid=pid, start=found.start)

    def _speak(self) -> None:
        speaker, self._speaker = self._speaker, -1
        try:
            with os.fdopen(speaker, "wb", closefd=True) as file:
                file.write(self._arguments)
        except OSError as error:
            raise ProviderError("bubblewrap ended at once", why=str(error)) from error

    def _join(self, pid: int) -> None:
        try:
            join(self._groups, pid)
        except ProcessLookupError:
            pass  # it died; what comes next says why
        except OSError as error:
            raise self._unlimited(error) from error

    def confine(self) -> None:
        """Give what waits its network.

        :raises ProviderError: that is not possible.
        """
        assert self._inner is not None
        if self.spec.app.network is Network.PRIVATE:
            self._helper = network.connect(
                self.machine, self._inner, self.plan.inside.port, self.options.denied, self.deadline
            )
            self._join(self._helper.pid)

    def _limits(self) -> dict[int, int | None]:
        """Return the resource limits; what no controller limits is approached here."""
        options, wanted = options_of(self.spec.app), self.spec.app.limits
        return {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NOFILE: options.nofile,
            resource.RLIMIT_FSIZE: options.file_size,
            resource.RLIMIT_DATA: None if self.machine.cgroups.limits("memory") else wanted.memory,
            # Counted per user id: exact where the agent has one of its own, wrong where it is everybody's.
            resource.RLIMIT_NPROC: wanted.pids if self.machine.own_uid else None,
        }

    def release(self) -> None:
        """Note that it is up, hand its output to the pump, open the gate.

        :raises ProviderError: it is dead already.
        """
        assert self._main is not None
        up: dict[str, Any] = {"main": asdict(self._main), "started_at": time.time(), "pidns": self._pidns}
        if self.machine.sandboxed:
            up["init"] = asdict(self._inner) if self._inner else None
        if self._helper:
            up["helper"] = asdict(self._helper)
        self.journals.append(self.spec.backend_name, up)
        self.attach(self._output, log_file(self.spec.log_dir))
        gate, self._gate = self._gate, -1
        try:
            os.write(gate, self._line)
        except OSError as error:
            raise ProviderError("The sandbox ended before the app began", why=str(error)) from error
        finally:
            os.close(gate)

    def explain(self, error: DispatcherError) -> None:
        """Add to an error what bubblewrap wrote before it ended."""
        said = launch.drain(self._output) if self._output >= 0 else ""
        if said:
            error.why = f"{error.why}; {said}" if error.why else said

    def undo(self) -> None:
        """Leave nothing of a start that failed.  The gate stays shut meanwhile: its end would open it."""
        self._passed.close()
        name = self.spec.backend_name
        limit = Deadline(_UNDO)
        record = self.journals.read(name)
        if record and self._main:
            init = self._inner if self.machine.sandboxed and self._inner is not self._main else None
            record = replace(record, main=self._main, init=init, helper=self._helper)
            processes.kill(record, self.group, lambda: limit.expired)
            launch.reap(self._main)
        if self.group:
            self.group.remove()
        self.secret_files.remove(name)
        self.journals.remove(name)
        with contextlib.suppress(ProviderError):
            clear_run_dir(self.spec.run_dir)

    def close(self) -> None:
        """Close all descriptors."""
        for fd in (self._gate, self._speaker):
            if fd >= 0:
                os.close(fd)
        self._gate = self._speaker = -1
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
        return self._pass(launch.memory_file("agent", content))

    def _unlimited(self, error: OSError) -> ProviderError:
        return ProviderError(
            "Cannot limit the agent", why=f"its control group: {error}", fix="see `dispatcher doctor`"
        )


def clear_run_dir(run_dir: Path) -> None:
    """Remove what an earlier run left in its run directory, memory that it would hold; never follows a link.

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
        raise ProviderError(
            f"Cannot clear {run_dir}", why=error.strerror or str(error), fix="look there, and remove what is odd"
        ) from error
