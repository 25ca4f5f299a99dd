"""The portal as a WSGI application, and its server: puts settings, pages, headers and errors together.

Static files have names that hold their hash: a name that changes with its content may be cached without expiry
(RFC 8246).  They and the templates are read when this module is imported, because the proxy's user may have no
access to where this program lies once privileges are dropped.
"""

from __future__ import annotations

import hashlib
import logging
import socket
from functools import partial
from pathlib import Path
from typing import NamedTuple

import waitress
from flask import Flask, Response
from jinja2 import DictLoader, StrictUndefined
from werkzeug.exceptions import NotFound
from werkzeug.middleware.proxy_fix import ProxyFix

from dispatcher.client.manager_client import ManagerClient
from dispatcher.common import humanize
from dispatcher.config.layout import Paths
from dispatcher.config.load import Config
from dispatcher.proxy import privileges
from dispatcher.proxy.portal import (
    account,
    agents,
    context,
    handover,
    responses,
    sign_in,
    sites,
    waiting_page,
    words,
)

MAX_BODY = 64 * 1024  # bytes; the longest form holds two passwords and a target
#: Threads for everything that is not a password check; those wait for the manager and cost 20 KiB each.
SPARE_THREADS = 8
TIMEOUT = 10.0  # seconds to wait for the manager
#: The same where it checks a password, which may be queued for half a minute before it is refused.
PASSWORD_TIMEOUT = 35.0
_HERE = Path(__file__).parent
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
}


class Asset(NamedTuple):
    """A static file: its name with the hash in it, media type, content."""

    name: str
    type: str
    body: bytes


def read_assets(directory: Path) -> dict[str, Asset]:
    """Return the files of known types in a directory, by their plain names."""
    found = {}
    for path in directory.iterdir():
        if (kind := _TYPES.get(path.suffix)) is not None:
            body = path.read_bytes()
            name = f"{path.stem}.{hashlib.sha256(body).hexdigest()[:16]}{path.suffix}"
            found[path.name] = Asset(name, kind, body)
    return found


_STATIC = read_assets(_HERE / "static")
_TEMPLATES = {path.name: path.read_text(encoding="utf-8") for path in (_HERE / "templates").glob("*.html")}


def create_app(config: Config, client: ManagerClient, login_client: ManagerClient | None = None) -> Flask:
    """Return the portal.

    :param config: `proxy` and `apps` are read.
    :param client: client for the manager, in the role *proxy*; used by many threads.
    :param login_client: the same, for requests that check a password; by default `client`.
    """
    app = Flask(__name__, static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=MAX_BODY, MAX_FORM_MEMORY_SIZE=MAX_BODY, MAX_FORM_PARTS=20)
    app.url_map.merge_slashes = False  # it would redirect to an absolute URL of whatever Host says
    app.jinja_env.loader = DictLoader(_TEMPLATES)
    app.jinja_env.undefined = StrictUndefined
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.jinja_env.filters |= {"sentence": words.sentence, "wait": partial(humanize.duration, up=True)}
    portal = context.Portal(config, client, login_client or client)
    app.extensions[context.EXTENSION] = portal
    for blueprint in (sign_in.pages, sites.pages, agents.pages, waiting_page.pages, account.pages, handover.pages):
        app.register_blueprint(blueprint, url_prefix=portal.prefix)

    @app.get(portal.prefix)
    def without_slash() -> Response:
        return context.go(context.local("/"))

    @app.get(f"{portal.prefix}/health")
    def health() -> Response:
        """Answer load balancers and monitors: without a session, a cookie or a request to the manager."""
        return Response("ok\n", content_type="text/plain; charset=utf-8")

    @app.get(f"{portal.prefix}/jwks.json")
    def identity_keys() -> Response:
        """Show the keys with which apps verify `X-Dispatcher-Identity`; without a session."""
        response = responses.data(portal.client.identity_keys())
        response.headers["Cache-Control"] = "public, max-age=300"
        return response

    by_hash = {asset.name: asset for asset in _STATIC.values()}

    @app.get(f"{portal.prefix}/static/<name>")
    def static_file(name: str) -> Response:
        if (asset := by_hash.get(name)) is None:
            raise NotFound
        response = Response(asset.body, content_type=asset.type)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        if asset == _STATIC["windows.js"]:
            response.headers["Service-Worker-Allowed"] = "/"
        return response

    @app.context_processor
    def for_templates() -> dict[str, object]:
        return {
            "local": context.local,
            "form_token": context.form_token,
            "request_id": responses.request_id,
            "asset": lambda name: context.local(f"/static/{_STATIC[name].name}"),
            # What a template does not get is not an error: most values have a usual absence.
            "someone": None,
            "signed_in": None,
            "notice": "",
            "faulty": "",
            "created": None,
            "user": "",
        }

    responses.install(app)
    # The edge is the only peer: its socket is private to the proxy.
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1, x_host=1)  # type: ignore[method-assign]
    return app


def serve(config: Config, sock: socket.socket) -> None:
    """Serve the portal until the process ends.

    :param sock: bound Unix socket, private to the proxy; the edge is its only client.
    """
    privileges.share_one_heap()
    # Waitress warns of each request that finds no idle thread, as the first ones do: no news for an operator.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    url = f"unix://{Paths.of(config).proxy_socket}"
    client, login_client = (ManagerClient(url, timeout=seconds) for seconds in (TIMEOUT, PASSWORD_TIMEOUT))
    waitress.serve(
        create_app(config, client, login_client),
        sockets=[sock],
        threads=context.LOGIN_SLOTS + SPARE_THREADS,
        asyncore_use_poll=True,  # descriptors past 1,024
        connection_limit=1000,
        clear_untrusted_proxy_headers=False,  # the edge has replaced them
        max_request_header_size=2 * config.proxy.head_bytes,
        max_request_body_size=4 * MAX_BODY,
        expose_tracebacks=False,
        ident=None,
    )
