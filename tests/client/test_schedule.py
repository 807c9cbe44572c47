"""Hours of the day: spans over midnight, spans that touch, the seconds that are left, and what is no span."""

import datetime
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import schedule

DAY = datetime.datetime(2026, 3, 2)


def at(text: str) -> datetime.datetime:
    hour, minute = map(int, text.split(":"))
    return DAY.replace(hour=hour, minute=minute)


@pytest.mark.parametrize(
    ("hours", "now", "minutes"),
    [
        ("", "12:00", math.inf),
        ("22:00-06:00", "21:59", 0),
        ("22:00-06:00", "22:00", 480),
        ("22:00-06:00", "00:00", 360),
        ("22:00-06:00", "05:59", 1),
        ("22:00-06:00", "06:00", 0),
        ("22:00-06:00, 12:30-13:30", "13:00", 30),
        ("22:00-24:00, 00:00-06:00", "23:00", 420),
        ("08:00-12:00,12:00-16:00,15:00-17:00", "11:00", 360),
        ("00:00-24:00", "11:00", math.inf),
        ("00:00-12:00, 12:00-24:00", "11:00", math.inf),
    ],
)
def test_the_time_that_is_left(hours: str, now: str, minutes: float) -> None:
    assert schedule.seconds_left(hours, at(now)) == 60 * minutes


NO_SPANS = ["night", "22-6", "25:00-26:00", "22:00-22:00", "10:60-11:00", "22:00-06:00;1:00-2:00"]


@pytest.mark.parametrize("hours", NO_SPANS)
def test_what_is_no_span_is_said(hours: str) -> None:
    with pytest.raises(ValueError, match="no span"):
        schedule.parse(hours)


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_one_span_is_open_exactly_from_its_start_to_its_end(first: int, last: int, now: int) -> None:
    if first == last:
        return
    text = "-".join(f"{m // 60:02d}:{m % 60:02d}" for m in (first, last))
    left = schedule.seconds_left(text, DAY + datetime.timedelta(minutes=now))
    inside = (now - first) % 1440 < (last - first) % 1440
    assert left == (60 * ((last - now) % 1440) if inside else 0)
