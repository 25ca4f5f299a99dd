"""The time limit of fixtures."""

from types import SimpleNamespace

import pytest

from dispatcher.testing.fixtures import FixtureLimit


class OfASession:
    """What pytest gives to the fixture of a session or a module."""

    @property
    def cls(self):
        raise AttributeError("cls not available in session-scoped context")


@pytest.mark.parametrize("name", ["tmp_path_factory", "provider"])
def test_a_fixture_that_belongs_to_no_class_has_none(name):
    setup = FixtureLimit().pytest_fixture_setup(SimpleNamespace(argname=name), OfASession())
    next(setup)
    with pytest.raises(StopIteration) as end:
        setup.send("value")
    assert end.value.value == "value"
