"""The authenticator `pam`: accounts of this host, through PAM.  The class is imported on demand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dispatcher.plugin import hookimpl

if TYPE_CHECKING:
    from dispatcher.plugin import Authenticator


@hookimpl
def dispatcher_register_authenticators() -> Iterable[type[Authenticator]]:
    """Register the authenticator under the name `pam`."""
    from dispatcher_pam.authenticator import PamAuthenticator

    return [PamAuthenticator]
