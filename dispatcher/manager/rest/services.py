"""The parts of the manager that the handlers of requests call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from dispatcher.config.load import Config
from dispatcher.config.plugins import Plugins
from dispatcher.manager.agents.composition import Supervisor
from dispatcher.manager.auth.app_identity import AppIdentity
from dispatcher.manager.auth.directory_sync import DirectorySync
from dispatcher.manager.auth.handover import HandoverCodes
from dispatcher.manager.auth.sessions import Sessions
from dispatcher.manager.auth.signin import SignIn
from dispatcher.manager.auth.tokens import ApiTokens
from dispatcher.manager.auth.web_signin import WebSignIn
from dispatcher.manager.metrics import Metrics
from dispatcher.manager.storage.database import Database
from dispatcher.plugin.deadline import SteadyWallClock


@dataclass(kw_only=True)
class Services:
    """The manager's parts.

    :ivar config: the current one; replaced by a reload.
    :ivar reload: reads the configuration again and says in sentences what changed, and what is wrong.
    :ivar sync_edge: waits briefly until the edge has received all changes: ended sessions are rejected everywhere.
    :ivar waiting: places for requests that wait; :ivar closing: set when the manager ends.
    """

    config: Config
    database: Database
    supervisor: Supervisor
    sessions: Sessions
    tokens: ApiTokens
    signin: SignIn
    web_signin: WebSignIn
    sync: DirectorySync
    identity: AppIdentity
    plugins: Plugins
    clock: SteadyWallClock
    metrics: Metrics
    reload: Callable[[], tuple[list[str], list[str]]]
    feed_connections: Callable[[], int]
    sync_edge: Callable[[], object] = lambda: None
    waiting: threading.BoundedSemaphore
    handovers: HandoverCodes = field(default_factory=HandoverCodes)
    closing: threading.Event = field(default_factory=threading.Event)
