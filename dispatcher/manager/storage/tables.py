"""The tables of `rows`; `agents` reads and writes them.

Rows are frozen dataclasses beside their tables, not mapped classes of SQLAlchemy's ORM.  Measured, a mapped
AgentRow takes 113 us to replace (25), 0.57 us to read a member (0.11) and 3 kB (0.3), importing the ORM takes
57 ms at every start, and mapped instances are mutable, while threads share these.
"""

from __future__ import annotations

import sqlalchemy as sa

from dispatcher.manager.storage.database import metadata
from dispatcher.manager.storage.rows import Failure, Move
from dispatcher.manager.storage.states import Desired, Kind, Pending
from dispatcher.manager.storage.types import EnumText, JsonDataclass, JsonTuple
from dispatcher.plugin.model import BackendState

users = sa.Table(
    "users",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(255), nullable=False, unique=True),
    sa.Column("password_hash", sa.Text),  # null: an external authenticator knows it
    sa.Column("created", sa.Float, nullable=False),
    sqlite_autoincrement=True,
)

agents = sa.Table(
    "agents",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(300), nullable=False, unique=True),
    sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("app", sa.String(32), nullable=False),
    sa.Column("provider", sa.String(32), nullable=False),  # where the agent and its data are now
    sa.Column("uid", sa.Integer, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),  # of the row: an older one never replaces a newer one
    sa.Column("desired", EnumText(Desired), nullable=False),
    sa.Column("keep_data", sa.Boolean, nullable=False),
    sa.Column("pending", EnumText(Pending), nullable=False),
    sa.Column("handle", sa.Text, nullable=False),
    sa.Column("observed", EnumText(BackendState), nullable=False),
    sa.Column("observed_at", sa.Float),
    sa.Column("ready", sa.Boolean, nullable=False),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("owner_uid", sa.Integer),
    sa.Column("started_at", sa.Float),
    sa.Column("spec_hash", sa.String(64), nullable=False),
    sa.Column("exit_reason", sa.Text, nullable=False),
    sa.Column("operation", EnumText(Kind), nullable=False),
    sa.Column("step", sa.String(64), nullable=False),
    sa.Column("operation_since", sa.Float),
    sa.Column("since", sa.Float, nullable=False),  # of the public state
    sa.Column("failure", JsonDataclass(Failure)),
    sa.Column("attempts", JsonTuple),  # times of automatic starts and failed starts
    sa.Column("retry_at", sa.Float),
    sa.Column("move", JsonDataclass(Move)),
    sa.Column("last_used", sa.Float),
    sqlite_autoincrement=True,  # another agent of the same name never gets the old one's id, nor its events
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("agent_id", sa.Integer, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("agent", sa.String(300), nullable=False),
    sa.Column("user", sa.String(255), nullable=False),
    sa.Column("app", sa.String(32), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Index("events_of_agent", "agent_id", "id"),
)

#: Host user ids in use: by an agent, or by data that was kept when its agent was removed.
uids = sa.Table(
    "uids",
    metadata,
    sa.Column("uid", sa.Integer, primary_key=True),
    sa.Column("agent", sa.String(300), nullable=False, unique=True),
)

#: Data kept on purpose when its agent was removed; a new agent of the same name gets it.
kept = sa.Table(
    "kept",
    metadata,
    sa.Column("agent", sa.String(300), primary_key=True),
    sa.Column("uid", sa.Integer, nullable=False),
    sa.Column("app", sa.String(32), nullable=False),
    sa.Column("provider", sa.String(32), nullable=False),
    sa.Column("handle", sa.Text, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
)

#: Old copies of data, kept by moves until purged: a directory, or what an old provider still holds.
copies = sa.Table(
    "copies",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("agent", sa.String(300), nullable=False, index=True),
    sa.Column("provider", sa.String(32), nullable=False),
    sa.Column(
        "directory", sa.String(64), nullable=False
    ),  # below the agent's copies/; "" when the provider holds it
    sa.Column("handle", sa.Text, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
)

#: Whether each provider's backend answered when it was last asked.
backends = sa.Table(
    "backends",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("reachable", sa.Boolean, nullable=False),
    sa.Column("since", sa.Float, nullable=False),
    sa.Column("contact", sa.Float),
)
