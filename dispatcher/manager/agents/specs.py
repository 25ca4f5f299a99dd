"""The apps and the agents' specs of one configuration, and the differences between two configurations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from dispatcher.common.contained import bounded
from dispatcher.config.app_secrets import read_secrets
from dispatcher.config.load import Config
from dispatcher.config.plugins import Plugins
from dispatcher.config.schema import AppDefaults
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.storage.rows import AgentRow
from dispatcher.plugin.errors import BadRequest, DispatcherError
from dispatcher.plugin.model import AgentSpec, App
from dispatcher.plugin.names import printable

CACHED = 256  # specs: a start needs one several times


class Specs:
    """Apps and specs of one configuration; replaced when the configuration is reloaded."""

    def __init__(
        self, *, config: Config, plugins: Plugins, data: AgentData, installation: str, proxy_gid: int
    ) -> None:
        self.config = config
        self._plugins = plugins
        self._data = data
        self._installation = installation
        self._proxy_gid = proxy_gid
        self._apps: dict[str, App] = {}
        self._hashes: dict[int, str | None] = {}
        self._spec = functools.lru_cache(CACHED)(self._make_spec)

    def default_app(self) -> str:
        """Return the app of new users.

        :raises BadRequest: there is none, or there are several and none is the default.
        """
        apps = self.config.apps
        if self.config.default_app:
            return self.config.default_app
        if len(apps) == 1:
            return next(iter(apps))
        if "demo" in apps:
            return "demo"
        if not apps:
            raise BadRequest(
                "No app is configured", fix="write an [apps.NAME] section into the configuration, then reload"
            )
        raise BadRequest(
            "There are several apps and no default",
            why=", ".join(sorted(apps)),
            fix="name one (`--app NAME` on the command line), or set `default_app` in the configuration",
        )

    def apps_of(self, provider: str) -> list[str]:
        """Return the apps that a provider isolates."""
        return sorted(name for name, app in self.config.apps.items() if app.provider == provider)

    def policy(self, app: str) -> AppDefaults:
        """Return an app's time-outs and limits; the defaults for an app that is no longer configured."""
        return self.config.apps.get(app, self.config.defaults)

    def provider(self, row: AgentRow) -> str:
        """Return the provider of an agent's app; the present one when the app is no longer configured."""
        app = self.config.apps.get(row.app)
        return app.provider if app else row.provider

    def app(self, name: str) -> App:
        """Return an app as its provider gets it.

        :raises DispatcherError: it is not configured, or wrongly.
        """
        app = self._apps.get(name)
        if app is None:
            app = made = self.config.template(name, self._plugins)
            ref = self._plugins.ref("provider", app.provider)
            bounded(ref, "the serialisation of its AppOptions", lambda: made.fingerprint_text)
            self._apps[name] = app
        return app

    def spec(self, row: AgentRow) -> AgentSpec:
        """Return the spec of an agent.

        :raises DispatcherError: as `app`.
        """
        return self._spec(row.name, row.user, row.app, *self._data.ids(row.uid))

    def spec_to_start(self, row: AgentRow, stdin: bytes | None) -> AgentSpec:
        """Return the spec of an agent, with the present values of its secrets.

        :param stdin: credentials of the sign-in, for an app that takes them.
        :raises DispatcherError: as `app`; :raises ConfigError: a secret cannot be read.
        """
        spec = self.spec(row)
        if stdin is not None and spec.app.credentials == "stdin":
            spec = dataclasses.replace(spec, stdin=stdin)
        sources = self.config.app(row.app).secrets
        return dataclasses.replace(spec, secrets=read_secrets(row.app, sources)) if sources else spec

    def _make_spec(self, agent: str, user: str, app: str, uid: int, gid: int) -> AgentSpec:
        return AgentSpec(
            installation=self._installation,
            agent=agent,
            user=user,
            app=self.app(app),
            uid=uid,
            gid=gid,
            proxy_gid=self._proxy_gid,
            data_dir=self._data.data_dir(agent),
            run_dir=self._data.paths.endpoint_dir(agent),
            log_dir=self._data.log_dir(agent),
        )

    def outdated(self, row: AgentRow) -> bool:
        """Whether an agent runs or is asleep with another spec than the present one."""
        if not row.spec_hash:
            return False
        if row.id not in self._hashes:
            try:
                self._hashes[row.id] = self.spec(row).hash
            except DispatcherError:
                self._hashes[row.id] = None
        return self._hashes[row.id] != row.spec_hash

    def check(self, app: str) -> None:
        """Check that an app can be used for a new agent.

        :raises BadRequest: there is no such app; :raises DispatcherError: its tables are wrong.
        """
        if app not in self.config.apps:
            known = ", ".join(sorted(self.config.apps)) or "none"
            raise BadRequest(
                f"There is no app {printable(app)}",
                why=f"the manager knows: {known}",
                fix="one that was added to the configuration needs `dispatcher reload`",
            )
        self.app(app)


def app_changes(old: Config, new: Config) -> Iterator[str]:
    """Describe the differences between the apps in sentences."""
    for name in sorted(old.apps.keys() | new.apps.keys()):
        before, after = old.apps.get(name), new.apps.get(name)
        if before is None:
            yield f"The app {name} is new."
        elif after is None:
            yield f"The app {name} was removed: its agents can be stopped, not started."
        elif before.provider != after.provider:
            yield (
                f"The app {name} has the provider {after.provider} instead of {before.provider}: "
                "its agents move at their next start."
            )
        elif before != after:
            one, two = before.model_dump(), after.model_dump()
            keys = ", ".join(sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key)))
            yield f"The app {name} has changed: {keys}."


def provider_changes(old: Config, new: Config) -> list[str]:
    """Return the providers whose own options differ."""
    names = old.providers.keys() | new.providers.keys()
    return sorted(name for name in names if old.providers.get(name, {}) != new.providers.get(name, {}))
