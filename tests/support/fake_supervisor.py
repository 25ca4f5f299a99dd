"""A supervisor in memory: agents change state when a test says so (or at once).  For tests of API and feed."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from dataclasses import replace

from dispatcher.plugin import names
from dispatcher.plugin.deadline import SteadyWallClock, boottime
from dispatcher.plugin.errors import BadRequest, Conflict, NotFound, Unsupported
from dispatcher.manager.agents.lifecycle import FeedState, State
from dispatcher.manager.storage.rows import Desired
from dispatcher.manager.storage.rows import Failure, UserRow
from dispatcher.manager.agents.agent import AgentView
from dispatcher.plugin.model import AgentEvent, Endpoint, Finding, Level

SETTLED = {
    "running": (State.RUNNING, FeedState.RUNNING),
    "suspended": (State.SUSPENDED, FeedState.ASLEEP),
    "hibernated": (State.HIBERNATED, FeedState.ASLEEP),
    "stopped": (State.STOPPED, FeedState.ASLEEP),
}


class FakeStore:
    def __init__(self, clock):
        self.rows: dict[str, UserRow] = {}
        self.kept_copies, self.kept_data = {}, {}
        self.clock = clock
        self.last_id = 0

    def get_user(self, name):
        return self.rows.get(name)

    def copies(self, agent):
        return self.kept_copies.get(agent, [])

    def kept(self, agent):
        return self.kept_data.get(agent)

    def users(self):
        return list(self.rows.values())

    def set_password_hash(self, name, password_hash):
        if name not in self.rows:
            raise NotFound(f"There is no user {name}")
        self.rows[name] = replace(self.rows[name], password_hash=password_hash)

    def bind_user(self, name, source, subject, groups):
        row = self.rows[name]
        free = row.source is None and row.password_hash is None
        same = row.source == source and (row.subject is None or subject is None or row.subject == subject)
        if free or same:
            self.rows[name] = replace(
                row, source=source, subject=subject or row.subject, groups=tuple(groups), departed=None
            )
        return free or same

    def set_departed(self, name, when):
        self.rows[name] = replace(self.rows[name], departed=self.rows[name].departed or when, groups=())

    def count_departed(self, now, most):
        passed, self.counted = now - getattr(self, "counted", now), now
        for name, row in self.rows.items():
            if row.departed is not None:
                departed = row.departed + passed - min(max(passed, 0.0), most)
                self.rows[name] = replace(row, departed=departed)

    def release_user(self, name):
        if name not in self.rows:
            raise NotFound(f"There is no user {name}")
        self.rows[name] = replace(
            self.rows[name], source=None, subject=None, groups=(), departed=None, password_hash=None
        )

    def users_of(self, source, subject):
        return [row for row in self.rows.values() if (row.source, row.subject) == (source, subject)]

    def add(self, name, password_hash=None):
        self.last_id += 1
        self.rows[name] = UserRow(
            id=self.last_id, name=name, password_hash=password_hash, created=self.clock.now()
        )


class FakeCopies:
    def __init__(self, supervisor):
        self._find = supervisor._find

    def list(self, agent):
        self._find(agent)
        return []

    def purge(self, agent):
        self._find(agent)
        return 0


class FakeSupervisor:
    """:ivar settle: agents reach what is desired at once; :ivar calls: what was asked, in order."""

    installation = "0a1b2c3d"

    def __init__(self, clock=None, *, settle=True):
        self.clock = clock or SteadyWallClock()
        self.store = FakeStore(self.clock)
        self.settle = settle
        self.calls = []
        self.rows: dict[str, AgentView] = {}
        self.changed = threading.Condition(threading.RLock())
        self.subscribers = []
        self.removal_subscribers = []
        self.access = self.commands = self.queries = self.registry = self.reconciler = self
        self.copies = FakeCopies(self)
        self.down = ""
        self.forbidden = set()

    def may_use(self, user, app):
        return app not in self.forbidden

    def first_app(self, user, groups):
        return next((app for app in ("demo", "lab") if app not in self.forbidden), None)

    def set_groups(self, user, groups):
        self.calls.append(("set_groups", user, sorted(groups)))

    def stop_all(self, user, reason):
        for view in self.views(user=user):
            self.set_desired(view.name, "stopped")

    def app_faults(self):
        return {}

    def start(self):
        pass

    def close(self):
        pass

    def _find(self, agent):
        view = self.rows.get(agent)
        if view is None:
            raise NotFound(f"There is no agent {agent}", fix="see: dispatcher list")
        return view

    def put(self, name, **members):
        """Set fields of an agent, and notify."""
        if "feed_state" in members:
            members["feed_state"] = FeedState(members["feed_state"])
        with self.changed:
            self.rows[name] = replace(self.rows[name], **members)
            self.changed.notify_all()
        self._tell(name)

    def vanish(self, name):
        """The agent is gone, its user with the last one."""
        with self.changed:
            user = self.rows.pop(name).user
            if not any(view.user == user for view in self.rows.values()):
                self.store.rows.pop(user, None)
            self.changed.notify_all()
        self._tell(name)
        self._tell_removal(name, user)

    def _tell_removal(self, name, user):
        for subscriber in self.removal_subscribers:
            subscriber(name, user)

    def _tell(self, name):
        for subscriber in self.subscribers:
            subscriber(name)

    def check_new(self, name, app):
        user = name.partition(":")[0]
        if app not in {None, "demo", "lab"}:
            raise BadRequest(f"There is no app {names.printable(app)}", fix="see the configuration")
        if user in self.rows and app and self.rows[user].app != app:
            name = f"{user}:{app}"
        if name in self.rows:
            raise Conflict(f"The agent {name} exists")
        return name, app or "demo"

    def create(self, name, *, app, password_hash):
        user = name.partition(":")[0]
        name, app = self.check_new(name, app)
        if user not in self.store.rows:
            self.store.add(user, password_hash)
        now = self.clock.now()
        self.rows[name] = AgentView(
            name=name,
            user=user,
            user_id=self.store.rows[user].id,
            app=app,
            provider="fake",
            state=State.STOPPED,
            desired=Desired.STOPPED,
            feed_state=FeedState.ASLEEP,
            label=names.key(name),
            since=now,
            created=now,
        )
        self._tell(name)
        return self.rows[name]

    def check_not_being_removed(self, name):
        if name in self.rows and self.rows[name].desired is Desired.ABSENT:
            raise Conflict(f"The agent {name} is being removed", fix="add it again when it is gone")

    def remove(self, agent, *, keep_data):
        user = self._find(agent).user
        self.calls.append(("remove", agent, keep_data))
        self.put(agent, desired=Desired.ABSENT, state=State.REMOVING, feed_state=FeedState.STOPPING)
        self._tell_removal(agent, user)
        if self.settle:
            self.vanish(agent)

    def set_desired(self, agent, state, *, stdin=None):
        self._find(agent)
        desired = Desired(state)
        self.calls.append(("set_desired", agent, desired.value, stdin))
        if desired is Desired.HIBERNATED:
            raise Unsupported("The provider fake cannot hibernate", fix="suspend it")
        self.put(agent, desired=desired)
        if self.settle:
            self.reach(agent)

    def reach(self, agent):
        """Have an agent be what is desired."""
        state, feed_state = SETTLED[self.rows[agent].desired.value]
        endpoint = Endpoint.unix(f"/run/x/{names.digest(agent)}/s") if feed_state is FeedState.RUNNING else None
        self.put(agent, state=state, feed_state=feed_state, endpoint=endpoint, owner_uid=None, failure=None)

    def lose(self, agent):
        """The backend does not answer."""
        self.put(agent, state=State.UNKNOWN, reachable=False)

    def fail(self, agent, what="The agent did not start"):
        failure = Failure(what=what, why="exit code 1", fix="see its log", log=("boom <b>",))
        self.put(agent, state=State.FAILED, feed_state=FeedState.FAILED, failure=failure, endpoint=None)

    def restart(self, agent):
        self._find(agent)
        self.calls.append(("restart", agent))
        self.put(agent, desired=Desired.RUNNING, state=State.STOPPING, feed_state=FeedState.STOPPING)
        if self.settle:
            self.reach(agent)

    def reset_data(self, agent):
        self._find(agent)
        self.calls.append(("reset_data", agent))

    def wake(self, agent):
        self.calls.append(("wake", agent))
        if agent in self.rows:
            self.set_desired(agent, "running")

    def record_activity(self, agent, activity):
        self.calls.append(("record_activity", agent, dict(activity)))

    def check_endpoint(self, agent):
        self.calls.append(("check_endpoint", agent))

    def view(self, agent):
        with self.changed:
            return self._find(agent)

    measured = view

    def views(self, *, user=None):
        with self.changed:
            return [view for view in self.rows.values() if user in {None, view.user}]

    def user_id(self, user):
        found = [self.rows[user]] if user in self.rows else self.views(user=user)
        return found[0].user_id if found else None

    def wait(self, agent, done, seconds):
        end = boottime() + seconds
        with self.changed:
            self._find(agent)
            while True:
                view = self.rows.get(agent)
                left = end - boottime()
                if done(view) or left <= 0:
                    return view
                self.changed.wait(left)

    def subscribe(self, on_change):
        self.subscribers.append(on_change)

    def on_removal(self, call):
        self.removal_subscribers.append(call)

    def runtime(self, agent):
        return {
            "handle": None,
            "endpoint": None,
            "uid": 200001,
            "provider": self._find(agent).provider,
            "started_at": None,
            "spec_hash": None,
            "usage": None,
        }

    def logs(self, agent, *, tail, after):
        self._find(agent)
        return ["one", "two"][-tail:] if tail else [], "7"

    def events(self, agent, limit):
        view = self._find(agent)
        kinds = ["created", "starting", "ready"][-limit:]
        return [AgentEvent(time=1.5, agent=agent, user=view.user, app=view.app, kind=kind) for kind in kinds]

    def why(self, agent):
        self._find(agent)
        return ["It runs because somebody signed in."]

    def memory_usage(self):
        return {"total": 0, "average": 0, "agents": []}

    def top(self):
        return []

    def every(self, seconds, call):
        pass

    @property
    def observers(self):
        return SimpleNamespace(states={})

    def providers(self):
        return [
            {
                "name": "fake",
                "isolation": "process",
                "capabilities": ["logs"],
                "distribution": "agent-dispatcher 0.1.0",
                "usable": not self.down,
                "error": self.down or None,
            }
        ]

    def check_provider(self, name, app):
        if name != "fake":
            raise NotFound(f"There is no provider {names.printable(name)}")
        return [Finding(level=Level.WARNING, what="It isolates nothing", fix="use another")]

    def apply_config(self, config):
        return []
