"""From what the engine says of a container to an observation.  Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dispatcher.plugin import BackendState, BadRequest, Endpoint, Handle, Observation
from dispatcher_docker.containers import LABEL

STATES = {
    "created": BackendState.STOPPED,
    "running": BackendState.RUNNING,
    "paused": BackendState.SUSPENDED,
    "restarting": BackendState.STARTING,
    "removing": BackendState.STOPPED,
    "exited": BackendState.STOPPED,
    "dead": BackendState.STOPPED,
}
_EXITED = re.compile(r"Exited \((\d+)\)")


def label(labels: Mapping[str, str] | None, name: str) -> str:
    """Return one of this provider's labels, or ""."""
    return (labels or {}).get(f"{LABEL}{name}", "")


def handle_from(labels: Mapping[str, str] | None) -> Handle | None:
    """Return the handle that a container carries, None if it carries none."""
    try:
        return Handle.from_json(label(labels, "handle"))
    except BadRequest:
        return None


def from_inspection(found: Mapping[str, Any], *, reach: str, current_image: str = "") -> Observation:
    """Return the observation for the answer of `GET /containers/ID/json`.

    :param reach: address for published ports; :param current_image: what the image's name means now, if known.
    """
    state = found["State"]
    labels = found["Config"].get("Labels")
    ports = {
        key: [(one.get("HostIp", ""), int(one["HostPort"])) for one in bindings or [] if one.get("HostPort")]
        for key, bindings in (found.get("NetworkSettings", {}).get("Ports") or {}).items()
    }
    said = STATES.get(state.get("Status", ""), BackendState.STOPPED)
    return _observation(
        said,
        labels,
        ports,
        reach=reach,
        current_image=current_image,
        started_at=unix_time(state.get("StartedAt", "")),
        exit_reason=reason(state) if said is BackendState.STOPPED else "",
        detail=state.get("Error", ""),
    )


def from_summary(found: Mapping[str, Any], *, reach: str, current_image: str = "") -> Observation:
    """Return the observation for one entry of `GET /containers/json`.

    That tells when a container was made, not when it was started, which may be days later.
    """
    ports: dict[str, list[tuple[str, int]]] = {}
    for one in found.get("Ports") or []:
        if one.get("PublicPort"):
            ports.setdefault(f"{one['PrivatePort']}/{one['Type']}", []).append(
                (one.get("IP", ""), one["PublicPort"])
            )
    exited = _EXITED.match(found.get("Status", ""))
    said = STATES.get(found.get("State", ""), BackendState.STOPPED)
    return _observation(
        said,
        found.get("Labels"),
        ports,
        reach=reach,
        current_image=current_image,
        started_at=None,
        exit_reason=code_reason(int(exited[1])) if exited and said is BackendState.STOPPED else "",
        detail="",
    )


def _observation(
    state: BackendState,
    labels: Mapping[str, str] | None,
    ports: Mapping[str, list[tuple[str, int]]],
    *,
    reach: str,
    current_image: str,
    started_at: float | None,
    exit_reason: str,
    detail: str,
) -> Observation:
    awake = state in {BackendState.RUNNING, BackendState.SUSPENDED}
    spec_hash = label(labels, "hash")
    if spec_hash and current_image and current_image != label(labels, "image-id"):
        # The name means another image now: no spec has this hash, so the core sees that it is outdated.
        spec_hash += "+image"
        detail = detail or f"the image {label(labels, 'image')} has changed since it was started"
    owner = label(labels, "owner")
    return Observation(
        state=state,
        endpoint=_endpoint(label(labels, "endpoint"), ports, reach) if awake else None,
        owner_uid=int(owner) if owner and awake else None,
        started_at=started_at,
        spec_hash=spec_hash,
        exit_reason=exit_reason,
        detail=detail,
    )


def _endpoint(said: str, ports: Mapping[str, list[tuple[str, int]]], reach: str) -> Endpoint | None:
    if said.startswith("unix:"):
        return Endpoint.unix(said.removeprefix("unix:"))
    published = ports.get(said.removeprefix("port:")) or []
    for host, port in published:
        return Endpoint.tcp(reach or host, port)
    return None


def reason(state: Mapping[str, Any]) -> str:
    """Return why a container ended by itself, from the `State` of its inspection; "" if it never ran."""
    if state.get("Status") == "created":
        return ""
    if state.get("OOMKilled"):
        return "out of memory"
    return code_reason(int(state.get("ExitCode") or 0))


def code_reason(code: int) -> str:
    """Return the words for an exit code; a shell's 128 + N is signal N."""
    return f"killed by signal {code - 128}" if 128 < code <= 192 else f"exit code {code}"


def unix_time(text: str) -> float | None:
    """Return Unix time for the engine's ISO 8601 with nanoseconds; None for its zero."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)", text)
    if not match or text.startswith("0001-"):
        return None
    zone = "+00:00" if match[3] == "Z" else match[3]
    return datetime.fromisoformat(f"{match[1]}{zone}").timestamp() + float(match[2] or 0)
