"""The provider `docker`: agents as containers of a Docker engine.  The class is imported on demand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dispatcher.plugin import hookimpl

if TYPE_CHECKING:
    from dispatcher.plugin import Provider


@hookimpl
def dispatcher_register_providers() -> Iterable[type[Provider]]:
    """Register the provider under the name `docker`."""
    from dispatcher_docker.provider import DockerProvider

    return [DockerProvider]
