"""Expected calibration error: how far confidence is from the share of right answers, from rows or from counts alone.

Answers are sorted into `BINS` bins of equal width by confidence; the error is the mean distance between confidence and
share right in a bin, weighted by the answers in it (Guo et al. 2017, arXiv:1706.04599). So that only counts have to
leave a clinic, each bin is cut into ten cells and every answer counts with the middle of its cell: that moves the
error by at most half a cell, 1/300. Few answers make any model look badly calibrated; `increase_interval` says how
much of a difference may be chance. Not covered: making a model better calibrated.
"""

from collections.abc import Sequence

import numpy as np

BINS, CELLS = 15, 150
RESAMPLES, SEED = 1000, 20_260_102
_MIDDLE = (np.arange(CELLS) + 0.5) / CELLS


def cells(confidence: Sequence[float], right: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Answers in each of `CELLS` cells of confidence (0..1), and how many of them were right."""
    place = np.clip((np.asarray(confidence, dtype=float) * CELLS).astype(int), 0, CELLS - 1)
    hits = np.asarray(right, dtype=bool)
    count = np.bincount(place, minlength=CELLS)
    good = np.bincount(place[hits], minlength=CELLS)
    return [int(n) for n in count], [int(n) for n in good]


def error(count: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray) -> float:
    """Expected calibration error (0..1) from answers per cell and right ones per cell; 0 for no answers at all."""
    return float(_errors(np.asarray(count, dtype=float)[None], np.asarray(right, dtype=float)[None])[0])


def _errors(count: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Errors of several sets of counts, (n, CELLS) each."""
    apart = (count * _MIDDLE - right).reshape(len(count), BINS, -1).sum(2)
    total = count.sum(1)
    return np.divide(np.abs(apart).sum(1), total, out=np.zeros(len(count)), where=total > 0)


def increase_interval(
    before: tuple[Sequence[float], Sequence[float]], after: tuple[Sequence[float], Sequence[float]], rows: int
) -> tuple[float, float]:
    """95 % bootstrap interval of error(after) - error(before), both given as (answers, right ones) per cell.

    `rows` answers are drawn again in each set. Rows of one picture are taken as independent, which they are not
    quite, and the two sets as unrelated, which makes the interval wider; counts tell no more.
    """
    generator = np.random.default_rng(SEED)
    found = []
    for count, right in (before, after):
        good = np.asarray(right, dtype=float)
        bad = np.asarray(count, dtype=float) - good
        chance = np.clip(np.concatenate([good, bad]), 0, None)
        drawn = generator.multinomial(rows, chance / chance.sum(), size=RESAMPLES)
        found.append(_errors(drawn[:, :CELLS] + drawn[:, CELLS:], drawn[:, :CELLS]))
    low, high = np.percentile(found[1] - found[0], [2.5, 97.5])
    return float(low), float(high)
