"""Which plugins a configuration uses."""

from __future__ import annotations

from dispatcher.config.load import Config


def configured(config: Config) -> dict[str, str]:
    """Return the names of the plugins that a configuration uses, each with what for."""
    providers = {app.provider for app in config.apps.values()} | set(config.providers)
    return {
        **dict.fromkeys(config.plugins, "observer"),
        config.auth.authenticator: "authenticator",
        **dict.fromkeys(providers, "provider"),
    }
