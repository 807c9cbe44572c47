"""What a person sees while the demo runs: numbered stages with elapsed time and a bar inside. Notes each stage's time.

Bars are drawn on a terminal; elsewhere a stage says where it is every ten seconds.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from tqdm import tqdm

BAR = "   {bar:30} {percentage:3.0f} %  {elapsed}"


class Stages:
    """Counts and times the stages; `seconds` is what the report tells, by stage."""

    def __init__(self, total: int) -> None:
        self.total, self.number = total, 0
        self.start = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, key: str, title: str) -> Iterator["Bar"]:
        """Announce a stage, time it, give its bar."""
        self.number += 1
        began = time.monotonic()
        say(f"[{self.number}/{self.total}] {title}  ({clock(began - self.start)} so far)")
        try:
            with Bar() as bar:
                yield bar
        finally:
            self.seconds[key] = round(time.monotonic() - began, 1)

    def total_seconds(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self.start, 1)


class Bar:
    """A progress bar from 0 to 1 that other lines can be written above."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._bar = tqdm(total=100, bar_format=BAR, disable=not self._shown, leave=False, file=sys.stderr)
        self._told = time.monotonic()
        self._lock = threading.Lock()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def at(self, share: float) -> None:
        """Move to this share, 0 to 1."""
        with self._lock:
            if self._shown:
                self._bar.n = round(100 * share, 1)
                self._bar.refresh()
            elif time.monotonic() - self._told > 10:
                self._told = time.monotonic()
                say(f"   {round(100 * share)} %")

    def line(self, text: str) -> None:
        """A line of its own, the bar stays below it."""
        with self._lock:
            tqdm.write(f"   {text}", file=sys.stderr)


def say(text: str) -> None:
    """One line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, as 3:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
