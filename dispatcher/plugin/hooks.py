"""All pluggy hooks.  Plugins implement them; behaviour lives in the classes that they return."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from dispatcher.plugin.authenticator import BaseAuthenticator
    from dispatcher.plugin.model import AgentEvent
    from dispatcher.plugin.provider import Provider

NAMESPACE = "dispatcher"

hookspec = pluggy.HookspecMarker(NAMESPACE)
hookimpl = pluggy.HookimplMarker(NAMESPACE)


@hookspec
def dispatcher_register_providers() -> Iterable[type[Provider]]:
    """Return the provider class of this plugin, which has the name of the entry point.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def dispatcher_register_authenticators() -> Iterable[type[BaseAuthenticator]]:
    """Return the authenticator class of this plugin, which has the name of the entry point.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def dispatcher_agent_event(event: AgentEvent) -> None:
    """Observe something that happened to an agent.  Exceptions are logged.

    Called in order, in a thread of the observer's own: a slow one delays neither the manager nor another.

    :param event: what happened.

    .. versionadded:: 0.1
    """
