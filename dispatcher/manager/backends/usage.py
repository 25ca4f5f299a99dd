"""The resource usage of agents, by one call per backend, all at the same time and for a bounded time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

from dispatcher.manager.backends.backend import Backend
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.model import Capability, Handle, Usage

TIMEOUT = 5.0  # seconds; a backend that has not answered by then is left out

_log = logging.getLogger("dispatcher.manager")


def collect_usage(wanted: Mapping[Backend, Sequence[Handle]]) -> dict[str, Usage]:
    """Return the usage of agents, by agent name, as far as the backends answer."""
    asked = {backend: handles for backend, handles in wanted.items() if Capability.USAGE in backend.capabilities}
    found: dict[str, Usage] = {}
    answered = threading.Semaphore(0)

    def query(backend: Backend, handles: Sequence[Handle]) -> None:
        try:
            usage = backend.provider.usage(handles, deadline=Deadline(TIMEOUT))
            found.update({handle.agent: usage[handle.name] for handle in handles if handle.name in usage})
        except DispatcherError as error:
            _log.warning("The usage of the agents of %s is unknown: %s", backend.name, error)
        finally:
            answered.release()

    for backend, handles in asked.items():
        backend.pool.submit(lambda backend=backend, handles=handles: query(backend, handles))  # type: ignore[misc]
    deadline = Deadline(TIMEOUT)
    for _ in asked:
        answered.acquire(timeout=deadline.remaining())
    return dict(found)
