"""The provider: the contract's methods.

An agent is a directory in the provider's state: the bundle, the files of its shim, and `record.json`.  Nothing is
kept in this process, so that a restarted manager finds all agents.
"""

import contextlib
import os
import shutil
import time
from pathlib import Path

from dispatcher.plugin import (
    SYSTEM_PATH,
    BackendState,
    Capability,
    ConfigError,
    Deadline,
    DeadlineExceeded,
    Depth,
    DispatcherError,
    Endpoint,
    Finding,
    Handle,
    Isolation,
    Network,
    NotFound,
    Observation,
    Provider,
    ProviderError,
    SecretFiles,
    Shim,
    SpecConflict,
    Usage,
    find_program,
    make_temporary,
    no_progress,
    read_lines,
    remove_logs,
    remove_tree,
    run_command,
)
from dispatcher_runc import bundle
from dispatcher_runc.options import AppOptions, Options

CGROUPS = Path("/sys/fs/cgroup")
FORCE = 2.0  # seconds that `stop` keeps for ending an agent by force
UNDO = 10.0  # seconds to remove a start that failed
LIMITS = {"memory": Capability.MEMORY_LIMIT, "cpu": Capability.CPU_LIMIT, "pids": Capability.PIDS_LIMIT}
FEATURES = {
    Capability.SUSPEND,
    Capability.LOGS,
    Capability.CREDENTIALS,
    Capability.NETWORK_NONE,
    Capability.NETWORK_HOST,
}


class RuncProvider(Provider):
    name = "runc"
    isolation = Isolation.CONTAINER
    Options = Options
    AppOptions = AppOptions

    def __init__(self, *, context, options):
        super().__init__(context=context, options=options)
        self._secrets = SecretFiles(
            f"dispatcher-{context.installation}-secrets-runc", [context.run_dir, Path("/dev/shm")]
        )

    # The backend: a program.

    @property
    def capabilities(self):
        found = _controllers()
        counted = {Capability.USAGE} if "memory" in found else set()
        return frozenset(FEATURES | counted | {LIMITS[name] for name in found})

    def check(self, *, deadline):
        if not self.context.privileged:
            raise ProviderError(
                "The provider runc cannot be used",
                why="only root can give each agent its own user id",
                fix="run the manager as root, or use the provider subprocess",
            )
        run_command([self.options.runtime, "--version"], f"Cannot run {self.options.runtime}", deadline=deadline)

    def explain(self, app):
        if app is not None:
            return list(self._explain_app(app))
        found = [
            Finding.ok("Agents are containers: own mount, pid, ipc, uts, cgroup namespaces; no capabilities"),
            Finding.ok(
                "Each agent has a host user id of its own, without a user namespace: inside it is the same"
            ),
            Finding.ok("A seccomp profile allows the system calls of ordinary apps alone, and no AF_VSOCK"),
            Finding.ok(
                "No daemon: nothing but the agents runs while the manager is down, and a shim of 9 MB for each"
            ),
        ]
        for name in LIMITS.keys() - _controllers():
            found.append(Finding.warning(f"The limit of {name} is not enforced: there is no such control group"))
        if not _init():
            found.append(Finding.warning("Apps are process 1, which must reap zombies itself", "install tini"))
        return found

    def _explain_app(self, app):
        if app.options.rootfs:
            yield Finding.ok(
                f"Its root file system is {app.options.rootfs}, read-only, and the same for all agents"
            )
        else:
            yield Finding.ok("Of the host's files it sees /usr, /etc and those in read_only, without a write")
        for path in app.options.writable:
            yield Finding.warning(f"It changes {path} of the host, as far as the modes there allow")
        if app.network is Network.HOST:
            yield Finding.warning(
                "It shares the host's network: services on the loopback interface and abstract sockets too",
                'use network = "none"',
            )
        else:
            yield Finding.ok("It has no network")

    def faults(self, app):
        return [str(error) for error in self._faults(app)]

    def _faults(self, app):
        options, key = app.options, f"apps.{app.name}.runc"
        if app.network is Network.PRIVATE:
            yield self.unsupported(Capability.NETWORK_PRIVATE)
        for name, capability in LIMITS.items():
            if app.limits.demanded("cpus" if name == "cpu" else name) and capability not in self.capabilities:
                yield self.unsupported(capability)
        if any("{port}" in text for text in (*options.command, *app.environment.values())):
            yield ConfigError(f"{key}.command: there is no {{port}}", fix="let the app listen on {socket}")
        for path in (*options.read_only, *options.writable, *filter(None, [options.rootfs])):
            if not path.exists():
                yield ProviderError(f"{key}: there is no {path}", fix="create it, or correct the path")
        root = options.rootfs or Path("/")
        search = app.environment.get("PATH", SYSTEM_PATH).split(":")
        if not shutil.which(options.command[0], path=":".join(f"{root}/{place}" for place in search)):
            yield ProviderError(
                f"{key}.command: there is no program {options.command[0]!r}",
                fix="install it, or correct the command",
            )

    def prepare(self, app, *, deadline, progress):
        for fault in self._faults(app):
            raise fault

    # One agent.

    def handle(self, spec):
        data = {"run_dir": str(spec.run_dir), "log_dir": str(spec.log_dir)}
        return Handle(provider=self.name, agent=spec.agent, name=spec.backend_name, data=data)

    def ensure(self, spec, *, deadline, progress):
        handle = self.handle(spec)
        shim = self._shim(handle)
        if shim.state is BackendState.RUNNING:
            if shim.record["hash"] != spec.hash:
                raise SpecConflict(f"{spec.agent} runs with another specification", fix="stop it first")
            self._resume(handle, deadline, progress)
            return handle
        self.prepare(spec.app, deadline=deadline, progress=progress)
        if deadline.expired:
            raise DeadlineExceeded(f"{spec.agent} was not started in time", fix="try again")
        self._remove(handle, deadline, progress)  # what an earlier run left
        try:
            progress("start", "preparing the container")
            self._start(handle, spec, deadline, progress)
        except BaseException:
            with contextlib.suppress(DispatcherError):
                self._remove(handle, Deadline(UNDO), no_progress)
            raise
        return handle

    def _start(self, handle, spec, deadline, progress):
        shim, secrets = self._shim(handle), None
        if spec.secrets:
            secrets = self._secrets.write(handle.name, spec.secrets, spec.uid, spec.gid)
        make_temporary(spec.data_dir / bundle.TEMPORARY, spec.uid, spec.gid, deadline)
        limits = spec.app.limits.enforced(self.capabilities)
        init = _init() if spec.app.options.init and not spec.app.options.rootfs else ""
        bundle.write(shim.directory, spec, init=init, secrets=secrets, limits=limits)
        pid_file = shim.directory / "pid"
        create = ["run", "--detach", "--bundle", str(shim.directory), "--pid-file", str(pid_file), handle.name]
        shim.start(
            [*self._runtime, *create],
            {
                "handle": handle.to_json(),
                "hash": spec.hash,
                "started": time.time(),
                "socket": str(spec.socket),
                "uid": spec.uid,
            },
            environment={"PATH": SYSTEM_PATH},
            log=_log(handle),
            log_size=self.options.log_size,
            log_files=self.options.log_files,
            stdin=spec.stdin or b"",
            umask=0o022,  # of the directories that the runtime makes; the app's is in the bundle
            pid_file=pid_file,
            deadline=deadline,
            progress=progress,
        )

    def observe(self, handle, *, deadline):
        shim = self._shim(handle)
        state, record = shim.state, shim.record
        if record is None:
            return Observation(state=BackendState.ABSENT)
        facts = {
            "spec_hash": record["hash"],
            "started_at": record["started"],
            "oom_kills": _oom_kills(handle.name),
        }
        if state is BackendState.STOPPED:
            reason = shim.exit_reason(out_of_memory=facts["oom_kills"] > 0)
            return Observation(state=state, exit_reason=record.get("reason", reason), **facts)
        return Observation(
            state=BackendState.SUSPENDED if _is_paused(handle.name) else state,
            endpoint=Endpoint.unix(record["socket"]),
            owner_uid=record["uid"],
            **facts,
        )

    def stop(self, handle, *, grace, deadline, progress):
        shim = self._shim(handle)
        if shim.state is BackendState.RUNNING:
            shim.note(reason="")
            self._resume(handle, deadline, progress)  # a process that is paused handles no signal
            with contextlib.suppress(ProviderError):  # it has just ended
                self._runc("kill", "--all", handle.name, "TERM", deadline=deadline)
            seconds = min(grace, deadline.remaining() - FORCE)
            shim.process.wait(seconds, lambda: progress("stop", "waiting for its end"))
        elif shim.state is not BackendState.ABSENT:
            shim.note(reason=self.observe(handle, deadline=deadline).exit_reason)
        self._runc("delete", "--force", handle.name, deadline=deadline, progress=progress)
        self._secrets.remove(handle.name)

    def destroy(self, handle, *, data, deadline, progress):
        self._remove(handle, deadline, progress)
        if data:
            remove_logs(_log(handle))

    def suspend(self, handle, *, depth, deadline, progress):
        if depth is not Depth.RAM:
            raise self.unsupported(Capability.HIBERNATE)
        self._must_run(handle)
        if not _is_paused(handle.name):
            self._runc("pause", handle.name, deadline=deadline, progress=progress)

    def resume(self, handle, *, deadline, progress):
        self._must_run(handle)
        self._resume(handle, deadline, progress)

    def logs(self, handle, *, tail, follow, deadline):
        return read_lines(_log(handle), tail=tail, follow=follow, deadline=deadline)

    # All agents.

    def list(self, *, deadline):
        for directory in self.context.state_dir.iterdir():
            if record := Shim(directory).record:
                handle = Handle.from_json(record["handle"])
                yield handle, self.observe(handle, deadline=deadline)

    def usage(self, handles, *, deadline):
        if Capability.USAGE not in self.capabilities:
            raise self.unsupported(Capability.USAGE)
        running = [one.name for one in handles if self._shim(one).state is BackendState.RUNNING]
        return {name: _usage(name) for name in running}

    # Helpers.

    @property
    def _runtime(self):
        return [self.options.runtime, "--root", str(self.context.run_dir / "containers")]

    def _runc(self, command, *arguments, deadline, progress=no_progress):
        what = f"Cannot {command} the container"
        return run_command([*self._runtime, command, *arguments], what, deadline=deadline, progress=progress)

    def _shim(self, handle):
        return Shim(self.context.state_dir / handle.name)

    def _must_run(self, handle):
        if self._shim(handle).state is not BackendState.RUNNING:
            raise NotFound(f"{handle.agent} does not run", fix="start it")

    def _resume(self, handle, deadline, progress):
        if _is_paused(handle.name):
            self._runc("resume", handle.name, deadline=deadline, progress=progress)

    def _remove(self, handle, deadline, progress):
        """Remove the container and all that is recorded of it; absent is success."""
        self._runc("delete", "--force", handle.name, deadline=deadline, progress=progress)
        shim = self._shim(handle)
        shim.remove()
        shutil.rmtree(shim.directory, ignore_errors=True)
        self._secrets.remove(handle.name)
        if run_dir := handle.data.get("run_dir"):
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(run_dir):
                    remove_tree(Path(run_dir, name))


def _log(handle):
    return Path(handle.data.get("log_dir") or os.devnull, "output.log")


def _init():
    return find_program("tini") or find_program("docker-init")


def _controllers():
    """Return the names in LIMITS that the host's control groups know, of version 2 or 1."""
    with contextlib.suppress(FileNotFoundError):
        return LIMITS.keys() & set((CGROUPS / "cgroup.controllers").read_text().split())
    return {name for name in LIMITS if (CGROUPS / name).is_dir()}


def _is_paused(name):
    for path in (CGROUPS / name / "cgroup.freeze", CGROUPS / "freezer" / name / "freezer.state"):
        with contextlib.suppress(OSError):  # of the other version, or it has ended
            if path.read_text().strip() not in {"0", "THAWED"}:
                return True
    return False


def _usage(name):
    used = _number("memory.current", name) or _number("memory.usage_in_bytes", name, "memory")
    cache = _number("memory.stat", name, key="inactive_file") or _number(
        "memory.stat", name, "memory", "total_inactive_file"
    )
    spent = _number("cpu.stat", name, key="usage_usec") / 1e6 or _number("cpuacct.usage", name, "cpuacct") / 1e9
    return Usage(memory=max(0, used - cache), cpu_seconds=spent)


def _oom_kills(name):
    return _number("memory.events", name, key="oom_kill") or _number(
        "memory.oom_control", name, "memory", "oom_kill"
    )


def _number(file, name, controller="", key=""):
    """Return a number of an agent's control group (of version 1 with a controller), 0 where there is none."""
    try:
        lines = (CGROUPS / controller / name / file).read_text().splitlines()
    except OSError:
        return 0
    words = [line.split() for line in lines]
    return next((int(line[-1]) for line in words if line[:-1] == ([key] if key else [])), 0)
