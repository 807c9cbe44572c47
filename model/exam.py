"""An examination of an adapter: the same held-out rows answered by the bare model, by what is installed, and by it.

Answers are scored strictly (`model.metrics`), each with a look whether it depends on the picture (`model.reliance`).
Only counts come out (`model.exam_counts`). The backend answers at the precision it was opened with, which should be
the kiosk's. Not covered: choosing the rows (`client.sealed`, the coordinator's own data) and judging the counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import calibration, data, exam_counts, metrics
from model.data import Sample
from model.exam_counts import Counts

LONGEST = 32  # tokens of an answer: references are single words or short phrases
BATCH = 16


class ExamTooLong(RuntimeError):
    """The examination was given up because its time was over."""


@dataclass(frozen=True)
class Marks:
    """What one adapter did, row by row; stays where the rows are. `reliant` is None where it was not measured."""

    right: list[bool]
    confidence: list[float]
    reliant: list[bool] | None


def answer(backend: Any, samples: Sequence[Sample], end: float | None = None, batch: int = BATCH) -> Marks:
    """Answer all samples with the backend as it is; raises ExamTooLong past `end` (a time of time.monotonic)."""
    from model.backends import Request

    order = sorted(range(len(samples)), key=lambda n: (samples[n].group, n))
    right, sure, marks = [False] * len(samples), [0.0] * len(samples), [""] * len(samples)
    for start in range(0, len(order), batch):
        if end is not None and time.monotonic() > end:
            raise ExamTooLong("the examination took longer than allowed")
        places = order[start : start + batch]
        pictures = {samples[n].group: data.load_rgb(samples[n]) for n in places}
        asked = [
            Request(pictures[samples[n].group], samples[n].question, samples[n].history, LONGEST, True) for n in places
        ]
        for item in backend.generate(asked):
            if isinstance(item, tuple):
                place, given = places[item[0]], item[1]
                right[place] = metrics.exact(given.text, samples[place].answer)
                sure[place], marks[place] = given.confidence, given.reliance or ""
    measured = all(marks)
    return Marks(right, sure, [mark == "image-reliant" for mark in marks] if measured else None)


def compare(
    backend: Any,
    samples: Sequence[Sample],
    installed: Path | None,
    candidate: Path,
    *,
    bits: int,
    end: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Counts:
    """Examine `candidate` beside `installed` (None: the bare model) on the samples; the backend is left as `candidate`.

    Raises what the backend raises for an adapter that does not fit, and ExamTooLong.
    """
    found: dict[str, Marks] = {}
    for name, folder in (("base", None), ("installed", installed), ("candidate", candidate)):
        if name == "installed" and folder is None:
            found[name] = found["base"]
            continue
        backend.swap_adapter(folder)
        found[name] = answer(backend, samples, end)
        say(f"examined {name}: {sum(found[name].right)} of {len(samples)} right")
    return count(found["base"], found["installed"], found["candidate"], [s.group for s in samples], bits)


def count(base: Marks, installed: Marks, candidate: Marks, groups: Sequence[str], bits: int) -> Counts:
    """The counts of three sets of marks of the same rows."""
    sizes = [list(groups).count(name) for name in set(groups)]
    seen = None
    if installed.reliant is not None and candidate.reliant is not None:
        seen = exam_counts.pair(_both(installed), _both(candidate), groups)
    return Counts(
        bits=bits,
        rows=len(groups),
        groups=len(sizes),
        squares=sum(size * size for size in sizes),
        installed=exam_counts.pair(installed.right, candidate.right, groups),
        base=exam_counts.pair(base.right, candidate.right, groups),
        reliance=exam_counts.pair(installed.reliant or [], candidate.reliant or [], groups) if seen else None,
        seen=seen,
        before=calibration.cells(installed.confidence, installed.right),
        after=calibration.cells(candidate.confidence, candidate.right),
    )


def _both(marks: Marks) -> list[bool]:
    """Rows that are right and depend on the picture."""
    return [right and reliant for right, reliant in zip(marks.right, marks.reliant or [], strict=True)]
