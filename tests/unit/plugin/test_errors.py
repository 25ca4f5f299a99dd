"""The error tree: one root, one line, codes and statuses that clients rely on."""

import pytest

from dispatcher.plugin import errors


def tree(cls=errors.DispatcherError):
    yield cls
    for child in cls.__subclasses__():
        if child.__module__ == "dispatcher.plugin.errors":
            yield from tree(child)


ALL = list(tree())


def test_codes_are_unique():
    codes = [cls.code for cls in ALL]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_each_error_has_a_status_and_an_exit_code_of_the_command_line(cls):
    assert 400 <= cls.status < 600
    assert cls.exit_code in {1, 2, 3, 4, 5}
    assert cls.__doc__


@pytest.mark.parametrize(
    ("cls", "status", "exit_code"),
    [
        (errors.BadRequest, 400, 2),
        (errors.ConfigError, 400, 2),
        (errors.Forbidden, 403, 1),
        (errors.NotFound, 404, 3),
        (errors.Conflict, 409, 4),
        (errors.SpecConflict, 409, 4),
        (errors.TooManyRequests, 429, 1),
        (errors.Unavailable, 503, 1),
        (errors.DeadlineExceeded, 504, 1),
        (errors.ManagerUnreachable, 503, 5),
    ],
)
def test_the_codes_that_are_promised(cls, status, exit_code):
    assert (cls.status, cls.exit_code) == (status, exit_code)


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({}, "It broke"),
        ({"why": "no disk"}, "It broke: no disk"),
        ({"fix": "buy one"}, "It broke (buy one)"),
        ({"why": "no disk", "fix": "buy one"}, "It broke: no disk (buy one)"),
    ],
)
def test_an_error_reads_as_what_why_and_what_to_do(parts, line):
    assert str(errors.DispatcherError("It broke", **parts)) == line


def test_errors_can_be_hashed_and_chained():
    cause = ValueError("x")
    try:
        raise errors.Unavailable("Down", retry_after=3) from cause
    except errors.DispatcherError as error:
        assert error.__cause__ is cause
        assert len({error}) == 1
        assert error.retry_after == 3
        assert error.details == {}
