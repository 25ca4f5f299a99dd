"""Sizes, durations and times as text."""

from datetime import datetime, timedelta, timezone

import pytest

from dispatcher.common import humanize

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (36175872, "34.5 MiB"),
        (2**40, "1.0 TiB"),
        (2**53, "8192.0 TiB"),
    ],
)
def test_sizes(count, text):
    assert humanize.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "a moment"),
        (0.4, "a moment"),
        (1, "1 second"),
        (59.9, "59 seconds"),
        (60, "1 minute"),
        (119, "1 minute"),
        (7200, "2 hours"),
        (90000, "1 day"),
        (1e6, "11 days"),
    ],
)
def test_durations(seconds, text):
    assert humanize.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "1 second"),
        (0.2, "1 second"),
        (3, "3 seconds"),
        (3.2, "4 seconds"),
        (61, "2 minutes"),
        (900, "15 minutes"),
    ],
)
def test_a_time_to_wait_is_never_too_short(seconds, text):
    assert humanize.duration(seconds, up=True) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-1, "0.0s"),
        (0.44, "0.4s"),
        (59, "59s"),
        (60, "1m"),
        (125, "2m 5s"),
        (12000, "3h 20m"),
        (349200, "4d 1h"),
        (86401, "1d"),
    ],
)
def test_short_durations(seconds, text):
    assert humanize.short_duration(seconds) == text


@pytest.mark.parametrize(
    ("when", "text"),
    [
        (None, "never"),
        ("", "never"),
        (NOW.isoformat(), "just now"),
        ((NOW - timedelta(minutes=3, seconds=20)).isoformat(), "3 minutes ago"),
        ("2026-05-01T09:00:00Z", "3 hours ago"),
        ("2026-05-01T10:00:00+01:00", "3 hours ago"),
        ("2026-05-01T11:59:00", "1 minute ago"),
        ((NOW + timedelta(days=2)).isoformat(), "in 2 days"),
        ("yesterday", "some time ago"),
    ],
)
def test_times(when, text):
    assert humanize.ago(when, now=NOW.timestamp()) == text
