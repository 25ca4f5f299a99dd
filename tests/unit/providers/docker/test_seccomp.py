"""The option `seccomp`: which profile it chooses."""

import pytest

from dispatcher.plugin import ProviderError
from dispatcher_docker import seccomp


def test_a_profile_that_cannot_be_read_is_named_by_its_option(tmp_path):
    with pytest.raises(ProviderError, match=r"apps\.web\.docker\.seccomp: '.*/none\.json' cannot be read"):
        seccomp.chosen(str(tmp_path / "none.json"), [], "web")
    (tmp_path / "own.json").write_text("{}")
    assert seccomp.chosen(str(tmp_path / "own.json"), [], "web") == "{}"
