"""Errors of docker-py, requests and urllib3, translated to the project's errors in one place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import docker.errors
import requests.exceptions
import urllib3.exceptions

from dispatcher.plugin import (
    Deadline,
    DeadlineExceeded,
    DispatcherError,
    NotFound,
    ProviderError,
    StartFailed,
    Unavailable,
)

_MAX_WHY = 600
#: A program that does not exist, in words of Go and of crun.
_NO_PROGRAM = re.compile(
    r'exec: "([^"]+)": (?:executable file not found|stat \S+ no such file)|executable file `([^`]+)` not found'
)
#: Of runc, crun and Podman: it was to run in the container.  Else the engine runs it, on its host.
_IN_CONTAINER = re.compile("container process|executable file `|oci runtime attempted to invoke a command")
_TIMEOUTS = (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)


class NoSuchObject(NotFound):
    """The engine has no container, image, network or volume of that name."""


class NameTaken(ProviderError):
    """The engine has a container of that name already."""


@contextmanager
def translated(doing: str, url: str, deadline: Deadline, engine: str = "Docker") -> Iterator[None]:
    """Translate the errors that the block raises; a DispatcherError passes through.

    :param doing: a verb phrase that completes "Docker could not ..."; :param engine: Docker or Podman.
    :raises DispatcherError: in place of any other.
    """
    try:
        yield
    except DispatcherError:
        raise
    except (
        docker.errors.DockerException,
        requests.exceptions.RequestException,
        urllib3.exceptions.HTTPError,
        OSError,
        ValueError,
    ) as error:
        raise _translate(error, doing, url, deadline, engine) from error


def _translate(error: BaseException, doing: str, url: str, deadline: Deadline, engine: str) -> DispatcherError:
    """Return the project's error for one of the SDK."""
    if isinstance(error, docker.errors.APIError) and error.response is not None:
        return _refused(error, doing, engine)
    if isinstance(error, docker.errors.TLSParameterError):
        return ProviderError(
            f"The TLS settings of the {engine} engine cannot be used",
            why=_text(error),
            fix="check tls_ca, tls_cert and tls_key in [providers.docker]",
        )
    chain = list(_chain(error))
    if deadline.expired or any(isinstance(one, _TIMEOUTS) for one in chain):
        return DeadlineExceeded(
            f"The {engine} engine did not {doing} in time",
            why=f"{url} accepts connections and does not answer soon enough",
            fix=f"check whether the engine is overloaded or hangs ({engine.lower()} info)",
            retry_after=5,
        )
    if any(isinstance(one, PermissionError) for one in chain):
        return Unavailable(
            f"The {engine} engine cannot be reached",
            why=f"no permission for {url}",
            fix="run the manager as root, or add its user to the group that owns the socket",
        )
    unit = "podman.socket" if engine == "Podman" else "docker"
    return Unavailable(
        f"The {engine} engine cannot be reached",
        why=f"{url}: {_text(chain[-1])}",
        fix=f"start it (systemctl start {unit}), or set url in [providers.docker]",
        retry_after=5,
    )


def _refused(error: docker.errors.APIError, doing: str, engine: str) -> DispatcherError:
    what, why = f"{engine} could not {doing}", _clip(error.explanation or str(error))
    status = error.status_code
    if isinstance(error, docker.errors.NotFound) or "no such container" in why:  # a 500 of Podman
        return NoSuchObject(what, why=why, fix="start the agent again, or check the name")
    if (status == 409 and "already in use by container" in why) or "that name is already in use" in why:
        return NameTaken(what, why=why, fix=f"remove that container ({engine.lower()} rm)")
    if status in {401, 403}:
        return ProviderError(what, why=why, fix="check the credentials of the registry or of the engine")
    return ProviderError(what, why=why, fix=_advice(why, engine.lower()))


def start_failed(error: ProviderError, log: list[str]) -> StartFailed:
    """Return the error for a container that the engine could not start."""
    return StartFailed("The container could not be started", why=error.why, fix=error.fix, details={"log": log})


def _advice(why: str, engine: str) -> str:
    text = why.lower()
    if missing := _NO_PROGRAM.search(text):
        if _IN_CONTAINER.search(text):
            return "correct `command`: the image has no such program"
        package = "apparmor" if missing[1] == "apparmor_parser" else f"the package that has {missing[1]}"
        return f"install {package} on the engine's host, then start the agent again"
    for words, fix in (
        ("no space left", f"free space where the engine keeps its data ({engine} system df)"),
        ("docker-default profile could not be loaded", "repair AppArmor on the engine's host (aa-status)"),
        ("apparmor", "correct `apparmor`: no profile of this name is loaded on the engine's host (aa-status)"),
        # The first docker.io of Ubuntu 24.04: the profile of containers does not name that of runc.
        (
            "unable to signal init: permission denied",
            f"upgrade {engine} and AppArmor on the engine's host: AppArmor keeps it from ending containers",
        ),
        ("permission denied", "correct `command`, or the modes in the image: the agent's user may not run it"),
        ("address already in use", "another program has the port; let the engine choose it"),
        ("could not select device driver", "install the GPU runtime of the engine, or remove `gpus`"),
        (
            "bind source path does not exist",
            "create it on the engine's host; a manager in a container needs its directories at the host's paths",
        ),
        ("no such file or directory", "create the path on the engine's host, or correct the configuration"),
        ("minimum memory limit", "raise `memory`: the engine requires at least 6M"),
        ("unauthorized", "check the credentials of the registry"),
        ("storage-opt", "remove `changes_size`, or put the engine's data on xfs mounted with pquota (overlay2)"),
        ("seccomp", "correct `seccomp`"),
    ):
        if words in text:
            return fix
    return f"read the engine's log (journalctl -u {engine})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = next((one for one in error.args if isinstance(one, BaseException)), None)
        error = error.__cause__ or error.__context__ or getattr(error, "reason", None) or inner
        if not isinstance(error, BaseException):
            return


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _clip(str(error)) or type(error).__name__


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_WHY else text[: _MAX_WHY - 1] + "…"
