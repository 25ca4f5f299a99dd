"""The apps and the agents' specs of one configuration, and the differences between two configurations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator

from dispatcher.common.contained import bounded
from dispatcher.config import groups
from dispatcher.config.app_secrets import read_secrets
from dispatcher.config.load import Config
from dispatcher.config.plugins import Plugins
from dispatcher.config.schema import AppDefaults
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.storage.rows import AgentRow
from dispatcher.plugin.errors import BadRequest, DispatcherError, Forbidden
from dispatcher.plugin.model import AgentSpec, App, Limits
from dispatcher.plugin.names import printable

CACHED = 256  # specs: a start needs one several times


class Memberships:
    """The groups that authenticators named, by the id of the user; ids are not reused."""

    def __init__(self) -> None:
        self._groups: dict[int, frozenset[str]] = {}

    def get(self, user_id: int | None) -> frozenset[str]:
        """Return the groups of a user."""
        return self._groups.get(user_id, frozenset()) if user_id is not None else frozenset()

    def set(self, user_id: int, groups: Collection[str]) -> bool:
        """Set the groups of a user; return whether they changed."""
        before = self._groups.pop(user_id, frozenset())
        if groups:
            self._groups[user_id] = frozenset(groups)
        return before != frozenset(groups)


class Specs:
    """Apps and specs of one configuration; replaced when the configuration is reloaded."""

    def __init__(
        self,
        *,
        config: Config,
        plugins: Plugins,
        data: AgentData,
        installation: str,
        proxy_gid: int,
        memberships: Memberships | None = None,
    ) -> None:
        self.config = config
        self._plugins = plugins
        self._data = data
        self._installation = installation
        self._proxy_gid = proxy_gid
        self._memberships = memberships or Memberships()
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
        limits = None
        if any(group.limits.model_fields_set for group in self.config.groups.values()):
            member_of = self.groups(row.user, row.user_id)
            limits = groups.limits(self.config.groups, member_of, self.app(row.app).limits)
        return self._spec(row.name, row.user, row.app, *self._data.ids(row.uid), limits)

    def groups(self, user: str, user_id: int | None) -> frozenset[str]:
        """Return all groups of a user."""
        return groups.groups_of(self.config.groups, user, self._memberships.get(user_id))

    def may_use(self, user: str, user_id: int | None, app: str) -> bool:
        """Whether a user may use an app."""
        return not self.config.groups or groups.may_use(self.config.groups, app, self.groups(user, user_id))

    def forget(self) -> None:
        """Compute again which agents are outdated: users have other groups."""
        self._hashes.clear()

    def spec_to_start(self, row: AgentRow, stdin: bytes | None) -> AgentSpec:
        """Return the spec of an agent, with the present values of its secrets.

        :param stdin: credentials of the sign-in, for an app that takes them.
        :raises DispatcherError: as `app`; :raises ConfigError: a secret cannot be read.
        :raises Forbidden: its user may not use the app.
        """
        self.check_allowed(row)
        spec = self.spec(row)
        if stdin is not None and spec.app.credentials == "stdin":
            spec = dataclasses.replace(spec, stdin=stdin)
        sources = self.config.app(row.app).secrets
        return dataclasses.replace(spec, secrets=read_secrets(row.app, sources)) if sources else spec

    def check_allowed(self, row: AgentRow) -> None:
        """Check that an agent's user may use its app.

        :raises Forbidden: the user is in no group that may.
        """
        if not self.may_use(row.user, row.user_id, row.app):
            wanted = groups.owners(self.config.groups, row.app)
            raise Forbidden(
                f"{row.user} may not use the app {row.app}",
                why=f"it is for members of {' or '.join(map(printable, wanted))}",
                fix="add the user to such a group, or change [groups] in the configuration",
            )

    def _make_spec(self, agent: str, user: str, app: str, uid: int, gid: int, limits: Limits | None) -> AgentSpec:
        made = self.app(app)
        return AgentSpec(
            installation=self._installation,
            agent=agent,
            user=user,
            app=made if limits is None else dataclasses.replace(made, limits=limits),
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


def group_changes(old: Config, new: Config) -> Iterator[str]:
    """Describe the differences between the groups in sentences."""
    for name in sorted(old.groups.keys() | new.groups.keys()):
        before, after = old.groups.get(name), new.groups.get(name)
        if before != after:
            become = "is new" if before is None else "was removed" if after is None else "has changed"
            yield f"The group {printable(name)} {become}."


def provider_changes(old: Config, new: Config) -> list[str]:
    """Return the providers whose own options differ."""
    names = old.providers.keys() | new.providers.keys()
    return sorted(name for name in names if old.providers.get(name, {}) != new.providers.get(name, {}))
