"""The hours of the day in which a clinic trains, by its own clock: "22:00-06:00, 12:30-13:30"; empty means always.

A span may go over midnight. The time is local and plain: on the two days a year on which clocks are changed, a span is
an hour longer or shorter. Not here: days of the week, and what is trained (`client.local_round`).
"""

import datetime
import math
import re

_SPAN = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")
_DAY = 24 * 60  # minutes


def parse(hours: str) -> list[tuple[int, int]]:
    """Spans in minutes of the day (start, end); an end on the next day lies above `_DAY`. Raises ValueError."""
    spans = []
    for text in filter(None, (part.strip() for part in hours.split(","))):
        found = _SPAN.fullmatch(text)
        if not found:
            raise ValueError(f'{text[:40]!r} is no span of hours; write "22:00-06:00", several with commas')
        first, last = (int(found[n]) * 60 + int(found[n + 1]) for n in (1, 3))
        if first >= _DAY or last > _DAY or first == last or any(int(found[n]) > 59 for n in (2, 4)):
            raise ValueError(f"{text!r} is no span of a day; hours go from 00:00 to 24:00, and a span has a length")
        spans.append((first, last if last > first else last + _DAY))
    return spans


def seconds_left(hours: str, now: datetime.datetime) -> float:
    """Seconds until training has to end: 0 outside the hours, infinite where there are none. Raises ValueError."""
    spans = parse(hours)
    if not spans:
        return math.inf
    minute = now.hour * 60 + now.minute + (now.second + now.microsecond / 1e6) / 60
    end = minute
    while True:  # one span may begin where another ends
        later = max((_end(span, end) for span in spans), default=end)
        if later <= end:
            return (end - minute) * 60
        if later - minute >= _DAY:
            return math.inf
        end = later


def _end(span: tuple[int, int], minute: float) -> float:
    """The end of a span around `minute` (which may lie on the next day), or `minute` itself when it is outside."""
    for days in (-1, 0, 1):
        first, last = (edge + days * _DAY for edge in span)
        if first <= minute < last:
            return last
    return minute
