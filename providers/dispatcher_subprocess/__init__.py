"""The provider `subprocess`: agents as sandboxed processes of this host.  The class is imported on demand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dispatcher.plugin import hookimpl

if TYPE_CHECKING:
    from dispatcher.plugin import Provider


@hookimpl
def dispatcher_register_providers() -> Iterable[type[Provider]]:
    """Return this plugin's one provider."""
    from dispatcher_subprocess.provider import SubprocessProvider

    return [SubprocessProvider]
