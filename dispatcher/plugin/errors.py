"""The one error tree of the project.  Touches nothing; everything may import it.

Every error carries three sentences for the person who reads it: *what* happened, *why*, and what to
do next (*fix*).  `status` is the HTTP status of the REST API (RFC 9110), `code` the machine-readable
slug of its problem details (RFC 9457), `exit_code` what the command line ends with.
"""

from __future__ import annotations

from typing import Any, ClassVar


class DispatcherError(Exception):
    """Root of all errors raised on purpose.

    :param what: what happened, one sentence without a full stop.
    :param why: the cause, if known.
    :param fix: what the reader can do next.
    :param retry_after: seconds after which trying again makes sense.
    :param details: JSON-serialisable extra members for the problem document.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        why: str = "",
        fix: str = "",
        retry_after: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix
        self.retry_after = retry_after
        self.details = details or {}

    def __str__(self) -> str:
        """One line: what, why, what to do."""
        text = self.what
        if self.why:
            text += f": {self.why}"
        if self.fix:
            text += f" ({self.fix})"
        return text


class BadRequest(DispatcherError):
    """Input that can never work as given."""

    code, status, exit_code = "bad-request", 400, 2


class ConfigError(BadRequest):
    """The configuration is wrong.  Names the key's full path, what was found and what was expected."""

    code = "bad-configuration"


class PluginError(ConfigError):
    """A plugin breaks its contract.  Names the distribution at fault."""

    code = "bad-plugin"


class Unauthorized(DispatcherError):
    """Over TCP, without a token or certificate that is known."""

    code, status = "unauthorized", 401


class Forbidden(DispatcherError):
    """Wrong password, dead session, or a role that may not do this."""

    code, status = "forbidden", 403


class NotFound(DispatcherError):
    """No such user, agent, session or app."""

    code, status, exit_code = "not-found", 404, 3


class Conflict(DispatcherError):
    """The request contradicts what exists or what is being done now."""

    code, status, exit_code = "conflict", 409, 4


class SpecConflict(Conflict):
    """`ensure` was called for an agent that exists with another specification."""

    code = "spec-conflict"


class TooManyRequests(DispatcherError):
    """Slowed down on purpose; `retry_after` says until when."""

    code, status = "too-many-requests", 429


class Unsupported(DispatcherError):
    """The provider does not declare this capability."""

    code, status = "unsupported", 422


class Cancelled(DispatcherError):
    """The operation was cancelled by a newer intent."""

    code, status, exit_code = "cancelled", 409, 4


class Unavailable(DispatcherError):
    """A backend (or the manager) cannot be asked now.  Says nothing about the agents' state."""

    code, status = "unavailable", 503


class DeadlineExceeded(Unavailable):
    """The operation did not finish before its deadline."""

    code, status = "deadline-exceeded", 504


class ManagerUnreachable(Unavailable):
    """The manager does not answer on its socket or port."""

    code, exit_code = "manager-unreachable", 5


class ProviderError(DispatcherError):
    """The backend answered, and refused or failed: image missing, no space, no permission, ..."""

    code, status = "provider-error", 502


class StartFailed(ProviderError):
    """The agent was started and did not become ready; `details["log"]` holds its last lines."""

    code = "start-failed"


class InsecureEndpoint(ProviderError):
    """An endpoint is not what the agent may offer: a link, another owner's socket, another's port."""

    code = "insecure-endpoint"
