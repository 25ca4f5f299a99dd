"""The environment of a sandbox."""

from pathlib import Path

import pytest
from dispatcher_subprocess import sandbox


def test_loader_variables_are_kept_from_roots_programs():
    plain, loader = sandbox.split_environment({"LD_PRELOAD": "x", "GLIBC_TUNABLES": "y", "HOME": "/data"})
    assert plain == {"HOME": "/data"} and set(loader) == {"LD_PRELOAD", "GLIBC_TUNABLES"}


@pytest.mark.parametrize(
    ("path", "root", "inside"),
    [
        ("/usr", "/usr", True),
        (Path("/usr/lib"), "/usr", True),
        ("/usr/lib", Path("/usr"), True),
        ("/usrlocal", "/usr", False),
        ("/", "/usr", False),
        ("/usr", "/", True),
        ("/", "/", True),
    ],
)
def test_below_compares_whole_names(path, root, inside):
    assert sandbox.below(path, [root]) is inside
    assert not sandbox.below(path, [])


def test_the_directories_above_a_path_are_made_once_and_from_the_top():
    tree = sandbox.Tree(made=["/"])
    tree.bind("--bind", "/a", "/run/agent")
    tree.bind("--bind", "/b", "/run/secrets/deep")
    made = [tree.words[at + 1] for at, word in enumerate(tree.words) if word == "--dir"]
    assert made == ["/run", "/run/secrets"]
