"""What the supervisor's tests share: one host with pretended agents, and a supervisor on it."""

from __future__ import annotations

import pytest

from tests.support.manager_world import World


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def supervisor(world):
    return world.supervisor()
