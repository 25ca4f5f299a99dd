"""A container's output as lines."""

import pytest
from dispatcher.plugin import MAX_LINE
from dispatcher_docker.logs import lines


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([], []),
        ([b"a\nb\n"], [b"a", b"b"]),
        ([b"a", b"b\nc"], [b"ab", b"c"]),
        ([b"\n\n"], [b"", b""]),
        ([b"\xff\x00\n"], [b"\xff\x00"]),
        ([b"x" * (MAX_LINE + 10) + b"\nnext\n"], [b"x" * MAX_LINE, b"next"]),
        ([b"x" * MAX_LINE, b"x" * MAX_LINE, b"x\nnext"], [b"x" * MAX_LINE, b"next"]),
        ([b"x" * (3 * MAX_LINE)], [b"x" * MAX_LINE]),
    ],
)
def test_lines_from_chunks(chunks, expected):
    assert list(lines(chunks)) == expected
