"""The manager's REST client, for the command line and the portal.

One method for each request that they make (docs/reference/rest.md).  A method returns the parsed JSON object, `{}`
for an answer without a body.  Problem documents become the errors of `dispatcher.plugin.errors`.  Thread-safe.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

from dispatcher.client.transport import Reply, Transport, not_understood, parse
from dispatcher.plugin import errors

Json = dict[str, Any]
PURGE_TIMEOUT = 330.0  # seconds; the manager gives up after 300


class ManagerClient:
    """A client of one manager.

    :param manager: the URL of its socket, ``unix:///PATH``, or a transport.
    :param timeout: seconds to wait for an answer, in addition to a `wait`.

    Every method raises `ManagerUnreachable`, and the error that the manager answered with.
    """

    def __init__(self, manager: str | Transport, *, timeout: float = 30.0) -> None:
        self.timeout = timeout
        self._transport = Transport(manager) if isinstance(manager, str) else manager

    def close(self) -> None:
        """Close all connections.  The client cannot be used any more."""
        self._transport.close()

    # Every listener.

    def healthz(self) -> Json:
        """``{"status": "ok"|"degraded", ...}``."""
        return self._get("/healthz")

    # Role admin: agents.

    def agents(self, state: str | None = None) -> Json:
        """``{"agents": [AGENT...]}``."""
        return self._rows("agents", "/agents", state=state)

    def create_agent(self, name: str, password: str | None = None, app: str | None = None) -> Json:
        """Create an agent, and its user when new (then `password` is needed); AGENT."""
        return self._post("/agents", {"name": name, "password": password, "app": app})

    def agent(self, name: str) -> Json:
        """AGENT."""
        return self._get(_agent(name))

    def delete_agent(self, name: str, *, keep_data: bool = False, wait: float | None = None) -> Json:
        """Remove an agent; AGENT, or `{}` once it is gone."""
        return self._request("DELETE", _agent(name), wait=wait, data="keep" if keep_data else None)

    def state(self, name: str) -> Json:
        """STATE."""
        return self._get(_agent(name, "state"))

    def set_state(self, name: str, state: str, *, wait: float | None = None) -> Json:
        """Ask for ``running``, ``suspended``, ``hibernated`` or ``stopped``; STATE."""
        return self._request("PUT", _agent(name, "state"), {"state": state}, wait=wait)

    def restart(self, name: str, *, wait: float | None = None) -> Json:
        """Stop and start an agent; STATE."""
        return self._request("POST", _agent(name, "restart"), wait=wait)

    def runtime(self, name: str) -> Json:
        """Return where an agent runs and what it uses."""
        return self._get(_agent(name, "runtime"))

    def logs(self, name: str, *, tail: int = 100, after: str | None = None) -> Json:
        """``{"lines": [...], "cursor": "..."}``; `after` is the last cursor."""
        return self._get(_agent(name, "logs"), tail=tail, after=after)

    def set_password(self, name: str, password: str) -> Json:
        """Change the password of an agent's user; ends the user's sessions."""
        return self._request("PUT", _agent(name, "password"), {"password": password})

    def reset_data(self, name: str, *, wait: float | None = None) -> Json:
        """Delete an agent's data; STATE."""
        return self._request("PUT", _agent(name, "reset_data"), wait=wait)

    def why(self, name: str) -> Json:
        """``{"agent", "sentences": [...]}``."""
        return self._get(_agent(name, "why"))

    def copies(self, name: str) -> Json:
        """``{"copies": [COPY...]}``: the data kept of an agent, or of a removed agent of this name."""
        return self._rows("copies", _agent(name, "copies"))

    def purge_copies(self, name: str) -> Json:
        """Delete them; ``{"purged": N}``.  Takes minutes where they are large."""
        return self._request("DELETE", _agent(name, "copies"), timeout=PURGE_TIMEOUT)

    # Role admin: the rest.

    def sessions(self, user: str | None = None) -> Json:
        """``{"sessions": [...]}``."""
        return self._rows("sessions", "/sessions", user=user)

    def revoke_session(self, id: str) -> Json:
        """End one session."""
        return self._request("DELETE", f"/sessions/{quote(id, safe='')}")

    def revoke_sessions(self, user: str) -> Json:
        """End all sessions of a user; ``{"revoked": N}``."""
        return self._request("DELETE", "/sessions", user=user)

    def tokens(self, user: str | None = None) -> Json:
        """``{"tokens": [TOKEN...]}``."""
        return self._rows("tokens", "/tokens", user=user)

    def create_token(
        self,
        *,
        scopes: Sequence[str],
        user: str | None = None,
        service: str | None = None,
        expires: str | None = None,
        note: str | None = None,
    ) -> Json:
        """Create an API token; TOKEN with the token itself as `token`."""
        body = {"user": user, "service": service, "scopes": list(scopes), "expires": expires, "note": note}
        return self._post("/tokens", body)

    def revoke_token(self, id: str) -> Json:
        """Revoke one API token."""
        return self._request("DELETE", f"/tokens/{quote(id, safe='')}")

    def revoke_tokens(self, user: str) -> Json:
        """Revoke all API tokens of a user; ``{"revoked": N}``."""
        return self._request("DELETE", "/tokens", user=user)

    def providers(self) -> Json:
        """``{"providers": [...]}``."""
        return self._rows("providers", "/providers")

    def plugins(self) -> Json:
        """``{"plugins": [...]}``."""
        return self._rows("plugins", "/plugins")

    def check_provider(self, name: str, app: str | None = None) -> Json:
        """``{"findings": [...]}``."""
        return self._rows("findings", f"/providers/{quote(name, safe='')}/check", app=app)

    def check_authenticator(self, plugin: str) -> Json:
        """``{"findings": [...]}``."""
        return self._rows("findings", "/authenticator/check", plugin=plugin)

    def begin_sync(self, *, force: bool = False, dry_run: bool = False) -> Json:
        """Begin a synchronisation with the directories; SYNC."""
        return self._post("/sync", {"force": force, "dry_run": dry_run})

    def sync(self) -> Json:
        """SYNC, the last one or that in progress."""
        return self._get("/sync")

    def test_sign_in(self, name: str, password: str | None = None, authenticator: str | None = None) -> Json:
        """``{"accepted", "refusal", ...}``: what a sign-in would give."""
        return self._post("/sign-in/test", {"name": name, "password": password, "authenticator": authenticator})

    def release_user(self, name: str) -> Json:
        """Let a name belong to no account of a directory."""
        return self._request("POST", f"/users/{quote(name, safe='')}/release")

    def memory_usage(self) -> Json:
        """``{"total", "average", "agents": [...]}`` in bytes."""
        return self._rows("agents", "/stats/memory_usage")

    def top(self) -> Json:
        """``{"agents": [...]}`` with what each uses."""
        return self._rows("agents", "/stats/top")

    def reload(self) -> Json:
        """Have the manager read its configuration again; ``{"changed": [sentence...]}``."""
        return self._request("POST", "/reload")

    # Role proxy.

    def login(
        self, user: str, password: str, address: str, user_agent: str | None = None, device: str | None = None
    ) -> Json:
        """``{"token", "device", "session": SESSION}``.

        :param address: of the person's browser; :param device: token of an earlier sign-in from it.
        """
        body = {"user": user, "password": password, "address": address}
        return self._post("/sessions", body | _given(user_agent=user_agent, device=device))

    def sign_in_methods(self) -> Json:
        """``{"passwords": bool, "sites": [{"name", "title"}...]}``."""
        return self._rows("sites", "/signin")

    def begin_sign_in(self, authenticator: str, nonce_sha256: str, address: str, next: str) -> Json:
        """``{"url"}`` of the other site, to which the browser goes."""
        body = {"authenticator": authenticator, "nonce_sha256": nonce_sha256, "address": address, "next": next}
        return self._post("/signin/begin", body)

    def finish_sign_in(
        self,
        authenticator: str,
        parameters: Mapping[str, str],
        nonce: str,
        address: str,
        user_agent: str | None = None,
        device: str | None = None,
    ) -> Json:
        """``{"token", "device", "session": SESSION, "next"}``.

        :param parameters: with which the other site sent the browser back; :param device: as for `login`.
        """
        body = {"authenticator": authenticator, "parameters": parameters, "nonce": nonce, "address": address}
        return self._post("/signin/finish", body | _given(user_agent=user_agent, device=device))

    def ended_elsewhere(self, authenticator: str, token: str, address: str) -> Json:
        """End the sessions that ended at another site; ``{"revoked": N}``."""
        return self._post("/signin/ended", {"authenticator": authenticator, "token": token, "address": address})

    def sign_out(self, sha256: str) -> Json:
        """End a session; ``{"url"}`` at which the browser ends it at the other site, too, or None."""
        return self._post("/sessions/sign-out", {"sha256": sha256}, again=True)

    def identity_keys(self) -> Json:
        """``{"keys": [...]}``: a JWK Set."""
        return self._get("/identity/keys")

    def lookup(self, sha256: str) -> Json:
        """SESSION; `NotFound` when it has ended or is unknown."""
        return self._post("/sessions/lookup", {"sha256": sha256}, again=True)

    def logout(self, sha256: str, id: str | None = None) -> Json:
        """End this session, or another one of the same user."""
        return self._post("/sessions/revoke", {"sha256": sha256, "id": id}, again=True)

    def my_agents(self, sha256: str) -> Json:
        """``{"agents": [AGENT...]}`` of the session's user."""
        return self._post("/sessions/agents", {"sha256": sha256}, again=True)

    def select(self, sha256: str, agent: str) -> Json:
        """Send the session's requests to another agent of its user; SESSION."""
        return self._post("/sessions/select", {"sha256": sha256, "agent": agent}, again=True)

    def my_state(self, sha256: str, agent: str, state: str) -> Json:
        """``running``, ``stopped`` or ``restart`` for an agent of the session's user; AGENT."""
        return self._post("/sessions/state", {"sha256": sha256, "agent": agent, "state": state})

    def my_sessions(self, sha256: str) -> Json:
        """``{"sessions", "changes_passwords", "tokens", "tokens_need_password"}`` of the session's user."""
        return self._post("/sessions/list", {"sha256": sha256}, again=True)

    def change_password(
        self, sha256: str, password: str, new_password: str, address: str, *, revoke_tokens: bool = False
    ) -> Json:
        """``{"token", "session": SESSION}``; all other sessions of the user end."""
        body = {"sha256": sha256, "password": password, "new_password": new_password, "address": address}
        return self._post("/sessions/password", body | _given(revoke_tokens=revoke_tokens or None))

    def create_my_token(
        self, sha256: str, address: str, *, password: str | None, expires: str | None, note: str | None
    ) -> Json:
        """Create an API token of the session's user; TOKEN with the token itself as `token`."""
        body = {"sha256": sha256, "address": address, "password": password, "expires": expires, "note": note}
        return self._post("/sessions/tokens", body)

    def revoke_my_token(self, sha256: str, id: str) -> Json:
        """Revoke an API token of the session's user."""
        return self._post("/sessions/tokens/revoke", {"sha256": sha256, "id": id}, again=True)

    def handover(self, sha256: str, host: str, nonce_sha256: str) -> Json:
        """``{"code"}`` that carries the sign-in to one host, once, within 30 seconds."""
        return self._post("/sessions/handover", {"sha256": sha256, "host": host, "nonce_sha256": nonce_sha256})

    def redeem(self, code: str, nonce: str, host: str) -> Json:
        """``{"token", "session": SESSION}`` for the code's host; ends with its parent."""
        return self._post("/sessions/redeem", {"code": code, "nonce": nonce, "host": host})

    def _get(self, path: str, **query: Any) -> Json:
        return self._request("GET", path, **query)

    def _rows(self, key: str, path: str, **query: Any) -> Json:
        """Return an answer whose member `key` is a list of objects."""
        found = self._get(path, **query)
        if not (isinstance(found[key], list) and all(isinstance(row, dict) for row in found[key])):
            raise not_understood(f"{key!r} is not a list of objects")
        return found

    def _post(self, path: str, body: Mapping[str, object], *, again: bool = False) -> Json:
        return self._request("POST", path, body, again=again)

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        wait: float | None = None,
        again: bool = False,
        timeout: float | None = None,
        **query: object,
    ) -> Json:
        given = _given(wait=wait, **query)
        content = None if body is None else json.dumps(_given(**body)).encode()
        target = f"{path}?{urlencode(given)}" if given else path
        reply = self._transport.request(
            method, target, content, (timeout or self.timeout) + (wait or 0.0), again=again
        )
        if reply.status >= 300:
            raise _error(reply, self._transport.url)
        return parse(reply, self._transport.url)


def _agent(name: str, *rest: str) -> str:
    return "/".join(["/agents", quote(name, safe=""), *rest])


def _given(**members: object) -> dict[str, object]:
    return {name: value for name, value in members.items() if value is not None}


def _classes(root: type[errors.DispatcherError]) -> Iterator[type[errors.DispatcherError]]:
    yield root
    for cls in root.__subclasses__():
        yield from _classes(cls)


def _error(reply: Reply, url: str) -> errors.DispatcherError:
    """Return the error that a problem document (RFC 9457) describes."""
    problem = parse(reply, url)
    known = list(_classes(errors.DispatcherError))
    found = [cls for cls in known if cls.code == problem.get("code")]
    found += [cls for cls in known if cls.status == reply.status]
    standard = {"type", "title", "status", "detail", "fix", "code"}
    return (found or known)[0](
        str(problem.get("title") or f"The manager answered {reply.status}"),
        why=str(problem.get("detail") or ""),
        fix=str(problem.get("fix") or ""),
        retry_after=float(reply.retry_after) if reply.retry_after.isdigit() else None,
        details={name: value for name, value in problem.items() if name not in standard},
    )
