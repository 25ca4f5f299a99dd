"""Which plugins a configuration uses."""

from __future__ import annotations

from dispatcher.config.load import Config


def configured(config: Config) -> dict[str, str]:
    """Return the names of the plugins that a configuration uses, each with what for."""
    providers = {app.provider for app in config.apps.values()} | set(config.providers)
    return {
        **dict.fromkeys(config.plugins, "observer"),
        **dict.fromkeys((entry.partition(".")[0] for entry in config.auth.authenticators), "authenticator"),
        **dict.fromkeys(providers, "provider"),
    }
