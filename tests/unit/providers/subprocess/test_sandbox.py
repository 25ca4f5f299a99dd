"""The environment of a sandbox."""

from dispatcher_subprocess import sandbox


def test_loader_variables_are_kept_from_roots_programs():
    plain, loader = sandbox.split_environment({"LD_PRELOAD": "x", "GLIBC_TUNABLES": "y", "HOME": "/data"})
    assert plain == {"HOME": "/data"} and set(loader) == {"LD_PRELOAD", "GLIBC_TUNABLES"}
