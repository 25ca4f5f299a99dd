"""The portal as a WSGI application.  `create_app` puts settings, pages, headers and errors together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Flask, Response
from jinja2 import DictLoader, StrictUndefined
from werkzeug.exceptions import NotFound
from werkzeug.middleware.proxy_fix import ProxyFix

from dispatcher.proxy.portal import account, agents, content, context, handover, sign_in, waiting, words
from dispatcher.proxy.portal.assets import STATIC, TEMPLATES

if TYPE_CHECKING:
    from dispatcher.client.manager_client import ManagerClient
    from dispatcher.config.load import Config

MAX_BODY = 64 * 1024  # bytes; the longest form holds two passwords and a target


def create_app(config: Config, client: ManagerClient, login_client: ManagerClient | None = None) -> Flask:
    """Return the portal.

    :param config: `proxy` and `apps` are read.
    :param client: client for the manager, in the role *proxy*; used by many threads.
    :param login_client: the same, for requests that check a password; by default `client`.
    """
    app = Flask(__name__, static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=MAX_BODY, MAX_FORM_MEMORY_SIZE=MAX_BODY, MAX_FORM_PARTS=20)
    app.url_map.merge_slashes = False  # it would redirect to an absolute URL of whatever Host says
    app.jinja_env.loader = DictLoader(TEMPLATES)
    app.jinja_env.undefined = StrictUndefined
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.jinja_env.filters["sentence"] = words.sentence
    portal = context.Portal(config, client, login_client or client)
    app.extensions[context.EXTENSION] = portal
    for blueprint in (sign_in.pages, agents.pages, waiting.pages, account.pages, handover.pages):
        app.register_blueprint(blueprint, url_prefix=portal.prefix)

    @app.get(portal.prefix)
    def without_slash() -> Response:
        return context.go(context.local("/"))

    by_hash = {asset.name: asset for asset in STATIC.values()}

    @app.get(f"{portal.prefix}/static/<name>")
    def static_file(name: str) -> Response:
        asset = by_hash.get(name)
        if asset is None:
            raise NotFound
        response = Response(asset.body, content_type=asset.type)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response

    @app.context_processor
    def for_templates() -> dict[str, object]:
        return {
            "local": context.local,
            "form_token": context.form_token,
            "request_id": content.request_id,
            "asset": lambda name: context.local(f"/static/{STATIC[name].name}"),
            # What a template does not get is not an error: most values have a usual absence.
            "someone": None,
            "signed_in": None,
            "error": None,
            "notice": "",
            "wait": "",
            "user": "",
        }

    content.install(app)
    # The edge is the only peer: its socket is private to the proxy.
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1, x_host=1)  # type: ignore[method-assign]
    return app
