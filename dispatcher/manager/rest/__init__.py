"""The REST interface (docs/reference/rest.md): one WSGI application for each role, and its listeners.

`agents`, `sessions`, `health`, `admin_requests` and `proxy_requests` hold the handlers, `schemas` the forms of
requests and answers; `access` determines the role of a caller, `routing` validates requests, `application` builds
the Flask application, `openapi` describes it.
"""

from __future__ import annotations

from dispatcher.manager.rest.application import application
from dispatcher.manager.rest.services import Services

__all__ = ["Services", "application"]
