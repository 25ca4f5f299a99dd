"""The option `seccomp`: which profile it chooses."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from dispatcher.plugin import ProviderError
from dispatcher_docker import seccomp


def test_a_profile_that_cannot_be_read_is_named_by_its_option(tmp_path):
    with pytest.raises(ProviderError, match=r"apps\.web\.docker\.seccomp: '.*/none\.json' cannot be read"):
        seccomp.chosen(str(tmp_path / "none.json"), [], "web")
    (tmp_path / "own.json").write_text("{}")
    assert seccomp.chosen(str(tmp_path / "own.json"), [], "web") == "{}"


def test_podman_gets_files_that_starts_at_the_same_time_share(tmp_path):
    """It takes the path of a profile, not the profile."""
    assert seccomp.as_file("", tmp_path) == "" and seccomp.as_file("unconfined", tmp_path) == "unconfined"
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: seccomp.as_file('{"x": 1}', tmp_path / "own"), range(50)))
    assert [path.read_text() for path in (tmp_path / "own").iterdir()] == ['{"x": 1}']
    assert found == {str(path) for path in (tmp_path / "own").iterdir()}
