"""The engine's events, reported as changes of agents by a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from dispatcher.plugin import Deadline, DispatcherError, boottime
from dispatcher_docker.host import Engine
from dispatcher_docker.observe import unix_time
from dispatcher_docker.options import LABEL

#: Events that can change an agent's state.
CHANGES = ("die", "oom", "pause", "unpause", "start", "stop", "kill", "destroy", "rename", "update")
#: Seconds without an event after which the stream is opened again, as the connection may be dead.
_QUIET = 60.0


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
