"""The authenticator `oidc`: users of an OpenID provider.  The class is imported on demand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dispatcher.plugin import hookimpl

if TYPE_CHECKING:
    from dispatcher.plugin import BaseAuthenticator


@hookimpl
def dispatcher_register_authenticators() -> Iterable[type[BaseAuthenticator]]:
    """Register the authenticator under the name `oidc`."""
    from dispatcher_oidc.authenticator import OidcAuthenticator

    return [OidcAuthenticator]
