"""An open tab is no use, whatever its script sends by the clock; a person's and a program's changes are."""

from __future__ import annotations

import pytest

from dispatcher.proxy.edge.routing.activity import PollDetector
from dispatcher.proxy.edge.http.request import SAFE, Request, parse_request


def change(
    path: bytes = b"/lab/api/workspaces/default", mode: bytes | None = b"cors", method: bytes = b"PUT"
) -> Request:
    line = b"" if mode is None else b"Sec-Fetch-Mode: " + mode + b"\r\n"
    return parse_request(method + b" " + path + b" HTTP/1.1\r\nHost: a\r\n" + line + b"\r\n", 100)


def verdicts(requests, pauses) -> list[bool]:
    detector, now, found = PollDetector(), 100.0, []
    for request, pause in zip(requests, pauses, strict=True):
        now += pause
        found.append(detector.is_poll(request, now))
    return found


def test_a_layout_that_is_written_down_every_ten_seconds() -> None:
    requests = [change(b"/lab/api/workspaces/default?%d" % at) for at in range(8)]
    pauses = [0, 10.05, 10.1, 9.9, 10.2, 10.0, 10.1, 10.05]
    assert verdicts(requests, pauses) == [False] * 3 + [True] * 5


def test_a_person_who_saves_now_and_then() -> None:
    requests = [change(b"/api/contents/Untitled.ipynb") for _ in range(8)]
    assert not any(verdicts(requests, [0, 4, 31, 3, 60, 8, 5, 120]))


def test_one_change_out_of_time_is_use_again() -> None:
    requests = [change() for _ in range(7)]
    assert verdicts(requests, [0, 10, 10, 10, 10, 3, 10]) == [False, False, False, True, True, False, False]


def test_typing_is_quick_and_never_a_clock() -> None:
    assert not any(verdicts([change() for _ in range(20)], [0.5] * 20))


@pytest.mark.parametrize("mode", [None, b"navigate"])
def test_programs_and_forms_are_always_use(mode: bytes | None) -> None:
    assert not any(verdicts([change(mode=mode, method=b"POST") for _ in range(8)], [10.0] * 8))


def test_many_targets_are_bounded() -> None:
    detector = PollDetector()
    for at in range(1000):
        detector.is_poll(change(b"/%d" % at), float(at))
    assert len(detector._changes._kinds) <= 128  # noqa: SLF001


def test_a_script_that_backs_off_while_its_app_sleeps_does_not_wake_it() -> None:
    request = change(b"/api/sessions?1795642948587", method=b"GET")
    assert request.traits & SAFE
    assert verdicts([request] * 7, [0, 10, 10, 29, 85, 250, 300]) == [False, False, *[True] * 5]


def test_reading_is_judged_as_before() -> None:
    request = change(b"/api/kernels?1795642178389", method=b"GET")
    assert request.traits & SAFE
    assert verdicts([request] * 4, [0, 10, 10, 10]) == [False, False, True, True]


def test_a_scripts_clock_without_fetch_metadata() -> None:
    """Over plain HTTP browsers send no `Sec-Fetch-*`; a script's change still has an Origin."""
    head = b"PUT /state HTTP/1.1\r\nHost: a\r\nOrigin: http://a\r\n\r\n"
    assert verdicts([parse_request(head, 100)] * 6, [0, 10, 10, 10, 10, 10]) == [False] * 3 + [True] * 3
    form = head.replace(b"\r\n\r\n", b"\r\nUpgrade-Insecure-Requests: 1\r\n\r\n")
    assert not any(verdicts([parse_request(form, 100)] * 6, [0, 10, 10, 10, 10, 10]))


def test_a_navigation_is_recognised_by_what_browsers_send_over_plain_http() -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade-Insecure-Requests: 1\r\n\r\n"
    assert not any(verdicts([parse_request(head, 100)] * 6, [0, 10, 10, 10, 10, 10]))


BROWSER = b"Accept: text/html,application/xhtml+xml,*/*;q=0.8\r\n"


@pytest.mark.parametrize(
    "metadata", [b"", b"Sec-Fetch-Mode: navigate\r\n"], ids=["plain HTTP, other host", "trustworthy origin"]
)
def test_opening_a_page_again_and_again_is_use_without_fetch_metadata_too(metadata: bytes) -> None:
    """Browsers send Fetch Metadata to HTTPS and localhost only; over plain HTTP a sleeping agent was never woken."""
    head = b"GET / HTTP/1.1\r\nHost: apps.example.test\r\n" + BROWSER + metadata + b"\r\n"
    assert not any(verdicts([parse_request(head, 100)] * 6, [0, 10, 10, 10, 10, 10]))


def test_a_script_that_fetches_a_page_is_a_poll() -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\nSec-Fetch-Mode: cors\r\n" + BROWSER + b"\r\n"
    assert verdicts([parse_request(head, 100)] * 4, [0, 10, 10, 10]) == [False, False, True, True]
