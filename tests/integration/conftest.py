"""Fixtures that several files share."""

import pytest

from tests.support.docker_tools import DockerWorld, images


@pytest.fixture(scope="module")
def _docker_world():
    images()
    world = DockerWorld()
    yield world
    world.close()


@pytest.fixture
def docker_world(_docker_world):
    """An installation with a Docker engine; after each test nothing of it is left there."""
    yield _docker_world
    _docker_world.end_check()
