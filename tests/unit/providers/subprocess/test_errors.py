"""Errors of the operating system."""

import errno
import os

import pytest
from dispatcher_subprocess.errors import failed


@pytest.mark.parametrize(
    "number, fix",
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "repair the state directory"),
        (errno.EROFS, "repair the state directory"),
        (errno.EMFILE, "repair the state directory"),
    ],
)
def test_the_disk_is_blamed_only_when_it_is_full(number, fix):
    error = failed("Cannot write it", OSError(number, os.strerror(number)), fix="repair the state directory")
    assert (error.why, error.fix) == (os.strerror(number), fix)
