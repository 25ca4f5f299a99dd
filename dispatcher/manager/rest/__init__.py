"""The REST interface (docs/reference/rest.md): one WSGI application for each role.

`routing` turns a request into a call of a handler and an error into a problem document; `agents`, `admin` and
`proxy` hold the handlers; `models` says what a request may hold, `openapi` describes it all.
"""

from __future__ import annotations

from dispatcher.manager.rest.application import application
from dispatcher.manager.rest.services import Services

__all__ = ["Services", "application"]
