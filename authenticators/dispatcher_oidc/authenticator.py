"""The authenticator: authorization code flow with PKCE, state and nonce (OpenID Connect Core 1.0, section 3.1)."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Mapping
from urllib.parse import quote_plus, urlencode, urlsplit

from dispatcher.plugin import (
    BadRequest,
    Deadline,
    Ended,
    Forbidden,
    Redirect,
    Unavailable,
    WebAuthenticator,
    WebIdentity,
    printable,
)
from dispatcher_oidc import claims as claim
from dispatcher_oidc import tokens
from dispatcher_oidc.discovery import Discovery, Metadata
from dispatcher_oidc.http import Json, Provider
from dispatcher_oidc.options import OidcOptions

MAX_CODE = 4096  # characters
MAX_HINT = 6000  # characters of an ID token in a URL, which servers bound to about 8,000
MAX_LOGOUTS = 10_000  # logout tokens that are remembered
#: The user's answer at the provider, which is not an error of the configuration.
_DECLINED = frozenset({
    "access_denied", "account_selection_required", "consent_required", "interaction_required", "login_required",
})  # fmt: skip


class OidcAuthenticator(WebAuthenticator):
    """Lets an OpenID provider sign users in."""

    name = "oidc"
    api_version = 1
    Options = OidcOptions
    options: OidcOptions
    several = True

    def __init__(self, *, options: OidcOptions) -> None:
        super().__init__(options=options)
        self._provider = Provider(options)
        self._discovery = Discovery(options, self._provider)
        self._logouts: dict[str, float] = {}  # jti of logout tokens, and when they are too old
        self._lock = threading.Lock()

    @property
    def title(self) -> str:
        """See `WebAuthenticator`."""
        return self.options.shown

    def begin(self, *, state: str, callback: str, deadline: Deadline) -> Redirect:
        """See `WebAuthenticator`."""
        endpoint = self._discovery.metadata(deadline).authorization
        nonce, verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(48)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        query = {
            **self.options.parameters,
            "response_type": "code",
            "client_id": self.options.client_id,
            "redirect_uri": callback,
            "scope": " ".join(dict.fromkeys(["openid", *self.options.scopes])),
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        return Redirect(url=_with_query(endpoint, query), kept=json.dumps({"nonce": nonce, "verifier": verifier}))

    def finish(
        self, parameters: Mapping[str, str], *, kept: str, callback: str, deadline: Deadline
    ) -> WebIdentity | None:
        """See `WebAuthenticator`."""
        metadata = self._discovery.metadata(deadline)
        # Another provider's answer must not reach this one (mix-up, RFC 9207, section 2.4).
        issuer = parameters.get("iss")
        if issuer != self.options.issuer and (issuer is not None or metadata.sends_issuer):
            raise BadRequest(
                f"The answer is not from {self.title}",
                why=f"its issuer is {printable(str(issuer), 200)}",
                fix="start again",
            )
        if (error := parameters.get("error")) is not None:
            if error in _DECLINED:
                return None
            told = ": ".join(filter(None, [error, parameters.get("error_description", "")]))
            raise BadRequest(f"{self.title} refuses the sign-in", why=printable(told, 300), fix="start again")
        code = parameters.get("code", "")
        if not 0 < len(code) <= MAX_CODE:
            raise BadRequest(f"The answer of {self.title} is incomplete", why="it has no code", fix="start again")
        begun = json.loads(kept)
        answer = self._exchange(metadata, code, begun["verifier"], callback, deadline)
        id_token, access_token = answer.get("id_token"), answer.get("access_token")
        if not isinstance(id_token, str):
            raise self._not_valid("ID token", "there is none")
        access_token = access_token if isinstance(access_token, str) and _is_token(access_token) else None
        try:
            header, found = self._verified(id_token, deadline)
            tokens.check_id_token(
                header,
                found,
                issuer=self.options.issuer,
                client_id=self.options.client_id,
                nonce=begun["nonce"],
                access_token=access_token,
                now=time.time(),
                skew=self.options.clock_skew,
            )
        except tokens.Invalid as error:
            raise self._not_valid("ID token", str(error)) from error
        return self._identity(metadata, found, id_token, access_token, deadline)

    def ended(self, token: str, *, deadline: Deadline) -> Ended | None:
        """See `WebAuthenticator`."""
        now = time.time()
        try:
            header, found = self._verified(token, deadline)
            end = tokens.check_logout_token(
                header,
                found,
                issuer=self.options.issuer,
                client_id=self.options.client_id,
                now=now,
                skew=self.options.clock_skew,
            )
        except tokens.Invalid:
            return None
        with self._lock:
            for old in [jti for jti, until in self._logouts.items() if until <= now]:
                del self._logouts[old]
            if found["jti"] in self._logouts:
                return None
            if len(self._logouts) >= MAX_LOGOUTS:
                del self._logouts[next(iter(self._logouts))]
            self._logouts[found["jti"]] = end
        session, subject = (
            found.get(name) if isinstance(found.get(name), str) else None for name in ("sid", "sub")
        )
        return Ended(session=session or None, subject=subject or None)

    def sign_out_url(self, *, kept: str, callback: str, deadline: Deadline) -> str | None:
        """See `WebAuthenticator`.  OpenID Connect RP-Initiated Logout 1.0, section 2."""
        endpoint = self._discovery.metadata(deadline).end_session if self.options.sign_out else None
        if endpoint is None:
            return None
        query = {"client_id": self.options.client_id, "post_logout_redirect_uri": callback}
        return _with_query(endpoint, {"id_token_hint": kept, **query} if kept else query)

    def check(self, *, deadline: Deadline) -> None:
        """Read configuration and keys, and see whether the provider accepts the client.

        :raises Unavailable: what is wrong.
        """
        self._discovery.forget()
        metadata = self._discovery.metadata(deadline)
        self._discovery.keys(deadline)
        # No code is right, but providers check the client first; other errors say nothing.
        form = {"grant_type": "authorization_code", "code": "dispatcher-doctor"}
        self._request_token(metadata, form, deadline)

    # -- tokens ------------------------------------------------------------------------------------------

    def _exchange(self, metadata: Metadata, code: str, verifier: str, callback: str, deadline: Deadline) -> Json:
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": callback,
            "code_verifier": verifier,
        }
        status, answer = self._request_token(metadata, form, deadline)
        if status == 200:
            return answer
        error = answer.get("error")
        if error in ("invalid_grant", "invalid_request"):  # a stranger can cause both with a code of their own
            told = f"{error}: {answer.get('error_description', '')}"
            raise BadRequest(
                f"{self.title} does not accept the code",
                why=f"it has expired, was used before, or is of another sign-in ({printable(told, 300)})",
                fix="start again",
            )
        raise self._provider.unusable(
            metadata.token, f"it answers with the status {status}, {printable(str(error), 100)}"
        )

    def _request_token(self, metadata: Metadata, form: dict[str, str], deadline: Deadline) -> tuple[int, Json]:
        """Send a request with the client's secret.

        :raises Unavailable: there is no answer, or the provider does not accept the client.
        """
        client, secret, headers = self.options.client_id, self._secret(), {}
        in_body = (
            metadata.secret_in_body if self.options.client_auth == "auto" else self.options.client_auth == "post"
        )
        if secret is None:
            form = {**form, "client_id": client}
        elif in_body:
            form = {**form, "client_id": client, "client_secret": secret}
        else:
            pair = f"{quote_plus(client)}:{quote_plus(secret)}"  # RFC 6749, 2.3.1
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        status, answer = self._provider.post(metadata.token, form, headers, deadline)
        if answer.get("error") in ("invalid_client", "unauthorized_client") or status == 401:
            raise Unavailable(
                f"{self.title} does not accept the client {client}",
                why=printable(str(answer.get("error", f"status {status}")), 100),
                fix="correct client_id, the secret in client_secret_file, or client_auth",
            )
        return status, answer

    def _secret(self) -> str | None:
        """Read the client's secret; each time, so that a new one needs no restart."""
        file = self.options.client_secret_file
        if file is None:
            return None
        try:
            secret = file.read_text("utf-8").strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise Unavailable(
                f"{file} cannot be read",
                why=getattr(error, "strerror", None) or "it is not UTF-8",
                fix="make it readable by the manager's user, or correct client_secret_file",
            ) from error
        if not secret:
            raise Unavailable(f"{file} is empty", fix="write the secret that the provider gave out into it")
        return secret

    def _verified(self, token: str, deadline: Deadline) -> tuple[Json, Json]:
        try:
            return tokens.verified(token, self._discovery.keys(deadline))
        except tokens.UnknownKey:
            return tokens.verified(token, self._discovery.keys(deadline, unknown=True))

    def _not_valid(self, what: str, why: str) -> Unavailable:
        return Unavailable(
            f"The {what} of {self.title} is not valid",
            why=why,
            fix=f"see whether the client {self.options.client_id} is right, and the clocks",
        )

    # -- the user ----------------------------------------------------------------------------------------

    def _identity(
        self, metadata: Metadata, found: Json, id_token: str, access_token: str | None, deadline: Deadline
    ) -> WebIdentity:
        known = found
        missing = [name for name in claim.wanted(self.options) if claim.find(found, name) is None]
        if missing and metadata.userinfo is not None and access_token is not None:
            told = self._user_information(metadata.userinfo, access_token, deadline)
            if told.get("sub") != found["sub"]:
                raise self._not_valid("user information", "it is about another user (sub)")
            # What the provider has signed counts more; an address and its verification belong together.
            known = {**told, **found}
            if "email" not in found and "email" in told:
                known["email_verified"] = told.get("email_verified")
        try:
            user, groups = claim.user(known, self.options), claim.groups(known, self.options)
            claim.check_required(known, self.options)
        except claim.Refused as error:
            raise Forbidden(f"{self.title} knows the user, who may not sign in here", why=str(error)) from error
        session = found.get("sid")
        return WebIdentity(
            user=user,
            groups=groups,
            subject=found["sub"],
            session=session if isinstance(session, str) and 0 < len(session) <= 255 else None,
            kept=id_token if metadata.end_session is not None and len(id_token) <= MAX_HINT else "",
        )

    def _user_information(self, url: str, access_token: str, deadline: Deadline) -> Json:
        told = self._provider.get_user(url, deadline, token=access_token)
        if not isinstance(told, str):
            return told
        try:
            _, found = self._verified(told, deadline)
            tokens.check_user_information(found, issuer=self.options.issuer, client_id=self.options.client_id)
        except tokens.Invalid as error:
            raise self._not_valid("user information", str(error)) from error
        return found


def _with_query(url: str, query: Mapping[str, str]) -> str:
    return url + ("&" if urlsplit(url).query else "?") + urlencode(query)


def _is_token(value: str) -> bool:
    return value.isascii() and value.isprintable() and 0 < len(value) <= tokens.MAX_TOKEN
