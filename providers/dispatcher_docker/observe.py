"""The state of containers: from the engine's answers to observations, why a container ended, and changes.

A container that was stopped on purpose has an exit code like one that ended by itself: a note in the provider's
state directory distinguishes the two.  The list of containers does not say which ran out of memory: each ended
container is inspected for that, once.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from dispatcher.plugin import (
    BackendState,
    BadRequest,
    Deadline,
    DispatcherError,
    Endpoint,
    Handle,
    Observation,
    ProviderError,
    boottime,
)
from dispatcher_docker import logs
from dispatcher_docker.engine import Engine
from dispatcher_docker.errors import NoSuchObject
from dispatcher_docker.options import LABEL

#: The states in which a container has processes, by the engine's names; in all others it is stopped.
ALIVE = {
    "running": BackendState.RUNNING,
    "paused": BackendState.SUSPENDED,
    "restarting": BackendState.STARTING,
}
_KILLED = 128 + 9
#: This provider's name of the state of Podman's containers whose end conmon, killed before, did not report.
LOST = "lost"
_LOST_REASON = "reason unknown: conmon, which watches the container for Podman, was killed"
#: Seconds that conmon has to report the end of a process.
_REPORT = 1.0
#: Ended containers that one `list` inspects at most.
_INSPECT_AT_ONCE = 32
#: What an image's own init (s6-overlay, runit) prints when it is not the first process.
_NEEDS_PID_1 = re.compile(r"\b(only|must)\b.*\bas (pid|process)( no)? 1\b", re.IGNORECASE)
_EXITED = re.compile(r"Exited \((\d+)\)")
#: Events that can change an agent's state; Podman has its own words for two of them.
CHANGES = (
    *("die", "oom", "pause", "unpause", "start", "stop", "kill", "destroy", "rename", "update"),
    *("died", "remove"),
)
#: Seconds without an event after which the stream is opened again, as the connection may be dead.
_QUIET = 60.0


def label(labels: Mapping[str, str] | None, name: str) -> str:
    """Return one of this provider's labels, or ""."""
    return (labels or {}).get(f"{LABEL}{name}", "")


def handle_from(labels: Mapping[str, str] | None) -> Handle | None:
    """Return the handle in a container's labels, None if there is none."""
    try:
        return Handle.from_json(label(labels, "handle"))
    except BadRequest:
        return None


def inspect(engine: Engine, name: str, deadline: Deadline) -> Mapping[str, Any] | None:
    """Return the engine's inspection of a container, None if there is none."""
    try:
        return _inspected(engine, name, deadline)
    except ProviderError as error:
        if "no such process" not in error.why:
            raise
        return _inspected(engine, name, deadline)  # Podman looked for the process of a container that just ended


def _inspected(engine: Engine, name: str, deadline: Deadline) -> Mapping[str, Any] | None:
    try:
        with engine.call("look for the container", deadline) as client:
            found: Mapping[str, Any] = client.inspect_container(name)
            if _is_lost(engine, found):
                time.sleep(min(_REPORT, deadline.remaining()))
                found = client.inspect_container(name)
                if _is_lost(engine, found):
                    return {**found, "State": {**found["State"], "Status": LOST}}
            return found
    except NoSuchObject:
        return None


def _is_lost(engine: Engine, found: Mapping[str, Any]) -> bool:
    """Whether Podman of this host shows a container as alive whose process has ended."""
    if not engine.is_podman or not engine.is_local or status(found) not in ALIVE:
        return False
    pid = _pid(found)
    return pid > 0 and not _lives(pid)


def _pid(found: Mapping[str, Any]) -> int:
    return int(found["State"].get("Pid") or 0)


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] not in {b"Z", b"X"}


class Lost:
    """Finds containers that Podman lists as alive although their processes have ended.

    The list has no process ids: each container is inspected once, and again when its process has ended; a call
    inspects a part of many.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pids: dict[str, int] = {}

    def mark(self, found: Iterable[dict[str, Any]], deadline: Deadline) -> None:
        """Give such containers of a list the state `LOST`."""
        if not self._engine.is_podman or not self._engine.is_local:
            return
        alive = {str(one["Id"]): one for one in found if one.get("State") in ALIVE}
        self._pids = {one: pid for one, pid in self._pids.items() if one in alive}
        unknown = [one for one in alive if one not in self._pids or not _lives(self._pids[one])]
        for one in unknown[:_INSPECT_AT_ONCE]:
            inspected = inspect(self._engine, one, deadline)
            if inspected:
                self._pids[one] = _pid(inspected)
                if status(inspected) == LOST:
                    alive[one]["State"] = LOST


def status(found: Mapping[str, Any]) -> str:
    """Return the engine's name of a container's state."""
    return str(found["State"].get("Status", ""))


def from_inspection(
    found: Mapping[str, Any], *, reach: str, current_image: str = "", podman: bool = False
) -> Observation:
    """Return the observation for the answer of `GET /containers/ID/json`.

    :param reach: address for published ports; :param current_image: id of the image that has the name now, ""
        if not known; :param podman: the engine is Podman.
    """
    state = found["State"]
    ports = {
        key: [(one.get("HostIp", ""), int(one["HostPort"])) for one in bindings or [] if one.get("HostPort")]
        for key, bindings in (found.get("NetworkSettings", {}).get("Ports") or {}).items()
    }
    seen = _observation(status(found), found["Config"].get("Labels"), ports, reach, current_image)
    return replace(
        seen,
        started_at=unix_time(state.get("StartedAt", "")),
        exit_reason=reason(found, podman=podman) if seen.state is BackendState.STOPPED else "",
        detail=state.get("Error", "") or seen.detail,
    )


def from_summary(found: Mapping[str, Any], *, reach: str, current_image: str = "") -> Observation:
    """Return the observation for one entry of `GET /containers/json`.

    It has the time of creation, not of the start, which may be days later.
    """
    ports: dict[str, list[tuple[str, int]]] = {}
    for one in found.get("Ports") or []:
        if one.get("PublicPort"):
            key = f"{one['PrivatePort']}/{one['Type']}"
            ports.setdefault(key, []).append((one.get("IP", ""), one["PublicPort"]))
    seen = _observation(found.get("State", ""), found.get("Labels"), ports, reach, current_image)
    if found.get("State") == LOST:
        return replace(seen, exit_reason=_LOST_REASON)
    exited = _EXITED.match(found.get("Status", ""))
    if exited and seen.state is BackendState.STOPPED:
        return replace(seen, exit_reason=code_reason(int(exited[1])))
    return seen


def _observation(
    state: str,
    labels: Mapping[str, str] | None,
    ports: Mapping[str, list[tuple[str, int]]],
    reach: str,
    current_image: str,
) -> Observation:
    """Return what state, labels and published ports tell."""
    backend_state = ALIVE.get(state, BackendState.STOPPED)
    spec_hash, detail = label(labels, "hash"), ""
    if spec_hash and current_image and current_image != label(labels, "image-id"):
        # Another image has the name now: no spec has this hash, so the core sees that the agent is outdated.
        spec_hash += "+image"
        detail = f"the image {label(labels, 'image')} has changed since it was started"
    if backend_state not in {BackendState.RUNNING, BackendState.SUSPENDED}:
        return Observation(state=backend_state, spec_hash=spec_hash, detail=detail)
    where, owner = label(labels, "endpoint"), label(labels, "owner")
    endpoint = Endpoint.unix(where.removeprefix("unix:")) if where.startswith("unix:") else None
    if published := ports.get(where.removeprefix("port:")):
        host, port = published[0]
        endpoint = Endpoint.tcp(reach or host, port)
    return Observation(
        state=backend_state,
        endpoint=endpoint,
        owner_uid=int(owner) if owner else None,
        spec_hash=spec_hash,
        detail=detail,
    )


def reason(found: Mapping[str, Any], *, podman: bool = False) -> str:
    """Return why a container ended by itself, from its inspection; "" if it never ran."""
    state = found["State"]
    if state.get("Status") == "created":
        return ""
    if state.get("Status") == LOST:
        return _LOST_REASON
    if state.get("OOMKilled"):
        return "out of memory"
    code = int(state.get("ExitCode") or 0)
    if podman and code == _KILLED and (found.get("HostConfig") or {}).get("Memory"):
        return f"{code_reason(code)}, perhaps for its memory, which Podman does not always tell"
    return code_reason(code)


def code_reason(code: int) -> str:
    """Describe an exit code; as in a shell, 128 + N is signal N."""
    return f"killed by signal {code - 128}" if 128 < code <= 192 else f"exit code {code}"


def unix_time(text: str) -> float | None:
    """Return Unix time for the engine's ISO 8601 with nanoseconds; None for its zero."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)", text)
    if not match or text.startswith("0001-"):
        return None
    zone = "+00:00" if match[3] == "Z" else match[3]
    return datetime.fromisoformat(f"{match[1]}{zone}").timestamp() + float(match[2] or 0)


class ExitReasons:
    """Why the containers that do not run ended.

    :param state_dir: the provider's own.
    """

    def __init__(self, engine: Engine, state_dir: Path) -> None:
        self._engine = engine
        self._stopped = state_dir / "stopped"
        self._reasons: dict[str, str] = {}

    def note_stop(self, handle: Handle, container: str) -> None:
        """Note that this container is being stopped on purpose."""
        self._stopped.mkdir(mode=0o700, exist_ok=True)
        (self._stopped / handle.name).write_text(container, encoding="ascii")

    def forget(self, handle: Handle) -> None:
        """Remove the note: the container starts, or is removed."""
        (self._stopped / handle.name).unlink(missing_ok=True)

    def _was_stopped(self, handle: Handle, container: str) -> bool:
        try:
            return (self._stopped / handle.name).read_text(encoding="ascii") == container
        except OSError:
            return False

    def complete(
        self, handle: Handle, container: str, observation: Observation, deadline: Deadline
    ) -> Observation:
        """Add the last lines of its output to an ended container's observation."""
        if self._was_stopped(handle, container):
            return replace(observation, exit_reason="")
        lines = self.last_lines(handle, deadline)
        if any(_NEEDS_PID_1.search(line) for line in lines):
            lines.append("its image has an init of its own: set init = false in the app's table [apps.X.docker]")
        return replace(observation, detail=observation.detail or " | ".join(lines))

    def complete_many(
        self, ended: Iterable[tuple[Handle, str, Observation]], deadline: Deadline
    ) -> Iterable[tuple[Handle, Observation]]:
        """Yield the observations of ended containers with their exit reasons, in few requests."""
        inspected = 0
        known: dict[str, str] = {}
        for handle, container, observation in ended:
            exit_reason = self._reasons.get(container, observation.exit_reason)
            if self._was_stopped(handle, container):
                exit_reason = ""
            elif container in self._reasons:
                known[container] = exit_reason
            elif exit_reason and inspected < _INSPECT_AT_ONCE:
                inspected += 1
                found = inspect(self._engine, container, deadline)
                if found and status(found) not in ALIVE:
                    exit_reason = known[container] = reason(found, podman=self._engine.is_podman)
            yield handle, replace(observation, exit_reason=exit_reason)
        self._reasons = known

    def last_lines(self, handle: Handle, deadline: Deadline) -> list[str]:
        """Return the last lines of a container's output."""
        try:
            found = logs.read(self._engine, handle.name, tail=3, deadline=deadline)
        except ProviderError:
            return []
        return [line.decode(errors="replace")[:200] for line in found]


class Watch:
    """Reports changes until `close`.  It reconnects by itself, and reports "" (any agent) after a gap."""

    def __init__(
        self, engine: Engine, installation: str, on_change: Callable[[str], None], log: logging.Logger
    ) -> None:
        self._engine, self._installation = engine, installation
        self._on_change, self._log = on_change, log
        self._closed = threading.Event()
        self._stream: Any = None
        self._created = boottime()
        self._since: str | None = None
        self._thread = threading.Thread(target=self._run, name="docker-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._closed.set()
        self._close_stream()
        if self._thread is not threading.current_thread():
            self._thread.join(5)

    def _close_stream(self) -> None:
        with contextlib.suppress(OSError, AttributeError, ValueError):  # closed already, or none
            self._stream.close()

    def _run(self) -> None:
        pause = 0.1
        gap = False
        while not self._closed.is_set():
            try:
                with self._engine.call("read events", Deadline(_QUIET)) as client:
                    if self._since is None:
                        # By the engine's clock, from this object's creation on.
                        elapsed = boottime() - self._created
                        now = unix_time(str(client.info()["SystemTime"])) or 0.0
                        self._since = f"{now - elapsed:.9f}"
                    self._stream = client.events(
                        since=self._since,  # type: ignore[call-overload]  # the engine takes text with nanoseconds too
                        decode=True,
                        filters={
                            "type": "container",
                            "event": list(CHANGES),
                            "label": f"{LABEL}installation={self._installation}",
                        },
                    )
                    if gap:
                        self._report("")
                    gap, pause = True, 0.1
                    for event in self._stream:
                        if self._closed.is_set():
                            return
                        self._on_event(event)
            except DispatcherError as error:
                if error.code == "deadline-exceeded":
                    # No event for a while: the next request asks for all since the last one, so none is lost.
                    gap = gap and self._since is None
                    continue
                self._log.debug("the events of the engine stopped: %s", error)
                gap = True
            finally:
                self._close_stream()
            self._closed.wait(pause)
            pause = min(2.0, pause * 2)

    def _on_event(self, event: Mapping[str, Any]) -> None:
        nanoseconds = event.get("timeNano")
        if isinstance(nanoseconds, int):
            seconds, rest = divmod(nanoseconds + 1, 1_000_000_000)
            self._since = f"{seconds}.{rest:09d}"
        name = ((event.get("Actor") or {}).get("Attributes") or {}).get("name")
        if name:
            self._report(str(name))

    def _report(self, name: str) -> None:
        if not self._closed.is_set():
            try:
                self._on_change(name)
            except Exception:
                self._log.exception("a callback for changes of containers failed")
