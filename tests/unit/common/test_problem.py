"""Problem documents have the same members everywhere."""

from dispatcher.common import problem
from dispatcher.plugin.errors import Conflict, StartFailed, Unavailable


def test_an_error_says_what_why_and_what_to_do_with_its_details():
    error = StartFailed(
        "It failed", why="exit code 1", fix="see its log", details={"log": ["boom"], "status": 200}
    )
    assert problem.of_error(error) == {
        "type": "about:blank",
        "title": "It failed",
        "status": 502,
        "detail": "exit code 1",
        "fix": "see its log",
        "code": "start-failed",
        "log": ["boom"],
    }


def test_the_code_is_made_of_the_title_if_there_is_no_other():
    assert problem.document(405, "Method Not Allowed")["code"] == "method-not-allowed"


def test_retry_after_is_said_where_trying_again_makes_sense():
    assert problem.retry_after(Conflict("busy")) == {}
    assert problem.retry_after(Conflict("busy", retry_after=0.2)) == {"Retry-After": "1"}
    assert problem.retry_after(Unavailable("down")) == {"Retry-After": "1"}
    assert problem.retry_after(Unavailable("down", retry_after=4.1)) == {"Retry-After": "5"}
