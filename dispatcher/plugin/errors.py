"""The errors of the project, in one tree.

Every error has three texts: *what* happened, *why*, and what to do next (*fix*).  `status` is the HTTP status
of the REST API (RFC 9110), `code` the machine-readable slug of its problem details (RFC 9457), `exit_code` the
exit code of the command line.
"""

from __future__ import annotations

from typing import Any, ClassVar


class DispatcherError(Exception):
    """Base class of all errors that the project raises.

    :param what: what happened, one sentence without a full stop.
    :param why: the cause, if known.
    :param fix: what the reader can do next.
    :param retry_after: seconds until a retry makes sense.
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
    """The configuration is invalid.  Names the key's full path, the value found and the value expected."""

    code = "bad-configuration"


class PluginError(ConfigError):
    """A plugin breaks its contract.  Names the distribution at fault."""

    code = "bad-plugin"


class Unauthorized(DispatcherError):
    """A request over TCP has no valid token or certificate."""

    code, status = "unauthorized", 401


class Forbidden(DispatcherError):
    """Wrong password, ended session, or a role without this right."""

    code, status = "forbidden", 403


class NotFound(DispatcherError):
    """No such user, agent, session or app."""

    code, status, exit_code = "not-found", 404, 3


class Conflict(DispatcherError):
    """The request contradicts what exists or is in progress."""

    code, status, exit_code = "conflict", 409, 4


class SpecConflict(Conflict):
    """`ensure` was called for an agent that exists with another specification."""

    code = "spec-conflict"


class TooManyRequests(DispatcherError):
    """Rate limit; `retry_after` is the time until the next attempt."""

    code, status = "too-many-requests", 429


class Unsupported(DispatcherError):
    """The provider does not declare this capability."""

    code, status = "unsupported", 422


class Cancelled(DispatcherError):
    """A newer command cancelled the operation."""

    code, status, exit_code = "cancelled", 409, 4


class Unavailable(DispatcherError):
    """A backend (or the manager) does not answer now.  The state of its agents is unknown."""

    code, status = "unavailable", 503


class DeadlineExceeded(Unavailable):
    """The operation did not finish before its deadline."""

    code, status = "deadline-exceeded", 504


class ManagerUnreachable(Unavailable):
    """The manager does not answer on its socket or port."""

    code, exit_code = "manager-unreachable", 5


class ProviderError(DispatcherError):
    """The backend refused or failed: image missing, no space, no permission, ..."""

    code, status = "provider-error", 502


class StartFailed(ProviderError):
    """The agent was started and did not become ready; `details["log"]` holds its last lines."""

    code = "start-failed"


class InsecureEndpoint(ProviderError):
    """An endpoint is not the agent's own: a link, a socket of another owner, another agent's port."""

    code = "insecure-endpoint"
