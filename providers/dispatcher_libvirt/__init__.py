"""The provider `libvirt`: agents as virtual machines.  The class is imported on demand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dispatcher.plugin import hookimpl

if TYPE_CHECKING:
    from dispatcher.plugin import Provider


@hookimpl
def dispatcher_register_providers() -> Iterable[type[Provider]]:
    """Return this plugin's one provider."""
    from dispatcher_libvirt.provider import LibvirtProvider

    return [LibvirtProvider]
