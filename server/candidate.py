"""Is a candidate good enough to be released? Decided by the counts of every place where it was examined.

Each place compares the candidate with what is installed there, on rows nobody trained on. In the total a place counts
by its rows, at most twice the median, as in the mean of the updates: one large set must not decide alone. Rules:
right answers must not fall beyond the 95 % interval, in the total and at any place (there the interval is widened for
the number of places), nor by more than `points` in the total, also against the bare base model; right answers that
depend on the picture (or all that do: `reliance`) must not fall by more than `points`, the calibration error must not
rise by more than `ece`. With fewer than `rows` rows a margin is a few answers: then only what is beyond
chance as well counts. Not covered: a place that sends possible but invented counts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from model import calibration, exam_counts
from model.exam_counts import Counts, Pair
from server.strategy import shares

LEVEL = 0.95


@dataclass(frozen=True)
class Thresholds:
    """The margins: `points` of right and of picture-dependent answers, `ece` of calibration error, and `rows`."""

    points: float = 2.0
    ece: float = 0.02
    rows: int = 200
    reliance: str = "right"  # which answers that depend on the picture are counted: "right" ones, or "all"


@dataclass(frozen=True)
class Place:
    """Where a candidate was examined: a clinic, or the server with its own data."""

    name: str
    counts: Counts


@dataclass(frozen=True)
class Rule:
    """One rule as it was applied: the change, its interval (in points or in error) and whether it was kept."""

    what: str
    place: str
    kept: bool
    change: float
    low: float
    high: float
    words: str


@dataclass(frozen=True)
class Change:
    """A difference of shares (-1..1) with its interval and the number of rows behind it."""

    before: float
    after: float
    mean: float
    low: float
    high: float
    rows: int


def judge(places: Sequence[Place], limits: Thresholds) -> list[Rule]:
    """Every rule, applied; the candidate passes when all are kept. No places, no rules."""
    if not places:
        return []
    found = [_accuracy(places, lambda c: c.installed, "right answers", limits)]
    found.append(_accuracy(places, lambda c: c.base, "right answers against the bare model", limits))
    level = 1 - (1 - LEVEL) / len(places)
    if len(places) > 1:
        found += [_right_at(place, level) for place in places]
    found += _reliance(places, limits, level)
    found.append(_calibration(places, limits))
    return found


def total(places: Sequence[Place], part: Callable[[Counts], Pair], level: float = LEVEL) -> Change:
    """The weighted difference over all places. The interval uses Student's t with Satterthwaite's degrees."""
    weights = shares([place.counts.rows for place in places])
    rows = [(w, p.counts, part(p.counts)) for w, p in zip(weights, places, strict=True)]
    parts = [(w, *exam_counts.difference(counts, one), counts.groups) for w, counts, one in rows]
    mean = sum(w * m for w, m, _, _ in parts)
    variance = sum(w * w * v for w, _, v, _ in parts)
    below = sum((w * w * v) ** 2 / max(1, groups - 1) for w, _, v, groups in parts)
    freedom = variance * variance / below if 0 < below < math.inf else math.inf
    wide = math.sqrt(variance) * quantile(level, freedom) if variance < math.inf else math.inf
    before = sum(w * one.before / counts.rows for w, counts, one in rows)
    after = sum(w * one.after / counts.rows for w, counts, one in rows)
    return Change(before, after, mean, max(-1.0, mean - wide), min(1.0, mean + wide), sum(c.rows for _, c, _ in rows))


def quantile(level: float, freedom: float) -> float:
    """Two-sided quantile of Student's t: 1.96 for 0.95 and many degrees of freedom, 2.57 for 5.

    Three terms of the expansion around the normal one (Abramowitz and Stegun 26.7.5), within 1 % from 4 degrees on.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    n = max(1.0, freedom)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def _rule(what: str, place: str, found: Change, kept: bool, reason: str) -> Rule:
    mean, low, high = (round(100 * value, 2) for value in (found.mean, found.low, found.high))
    words = (
        f"{place}: {what} {100 * found.before:.1f} % -> {100 * found.after:.1f} % of {found.rows} "
        f"({mean:+.1f} points, interval {low:+.1f} to {high:+.1f}){reason}"
    )
    return Rule(what, place, kept, mean, low, high, words)


def _accuracy(places: Sequence[Place], part: Callable[[Counts], Pair], what: str, limits: Thresholds) -> Rule:
    found = total(places, part)
    worse = found.high < 0
    far = 100 * found.mean < -limits.points and found.rows >= limits.rows
    reason = ", worse beyond chance" if worse else f", worse by more than {limits.points:g} points" if far else ""
    return _rule(what, "all places", found, not (worse or far), reason)


def _right_at(place: Place, level: float) -> Rule:
    found = total([place], lambda c: c.installed, level)
    worse = found.high < 0
    return _rule("right answers", place.name, found, not worse, ", worse beyond chance" if worse else "")


def _reliance(places: Sequence[Place], limits: Thresholds, level: float) -> Iterator[Rule]:
    """Answers that depend on the picture: in the total, and beyond chance at each place."""
    every = limits.reliance == "all"
    what = "answers that depend on the picture" if every else "right answers that depend on the picture"
    known = [place for place in places if place.counts.reliance is not None]
    several = [[place] for place in known] if len(known) > 1 else []
    for chosen in ([known] if known else []) + several:
        alone = len(chosen) == 1 and len(known) > 1
        found = total(chosen, _reliant if every else _seen, level if alone else LEVEL)
        far = 100 * found.mean < -limits.points and (found.high < 0 or (found.rows >= limits.rows and not alone))
        name = chosen[0].name if alone else "all places"
        yield _rule(what, name, found, not far, f", fewer by more than {limits.points:g} points" if far else "")


def _reliant(counts: Counts) -> Pair:
    assert counts.reliance is not None
    return counts.reliance


def _seen(counts: Counts) -> Pair:
    assert counts.seen is not None
    return counts.seen


def _calibration(places: Sequence[Place], limits: Thresholds) -> Rule:
    """Calibration error of all places together; a place counts as in the total."""
    weights = shares([place.counts.rows for place in places])
    rows = sum(place.counts.rows for place in places)

    def sums(side: str, row: int) -> list[float]:
        lists = [(w / p.counts.rows, getattr(p.counts, side)[row]) for w, p in zip(weights, places, strict=True)]
        return [rows * sum(w * cells[n] for w, cells in lists) for n in range(calibration.CELLS)]

    before, after = ((sums(side, 0), sums(side, 1)) for side in ("before", "after"))
    old, new = calibration.error(*before), calibration.error(*after)
    low, high = calibration.increase_interval(before, after, rows)
    far = new - old > limits.ece and (low > 0 or rows >= limits.rows)
    words = (
        f"all places: calibration error {old:.3f} -> {new:.3f} of {rows} ({new - old:+.3f}, 95 % interval "
        f"{low:+.3f} to {high:+.3f})" + (f", higher by more than {limits.ece:g}" if far else "")
    )
    return Rule("calibration error", "all places", not far, round(new - old, 4), round(low, 4), round(high, 4), words)


def rows_of(places: Sequence[Place]) -> list[dict[str, Any]]:
    """What each place counted, in plain values for the passport."""
    weights = shares([place.counts.rows for place in places]) if places else []
    found = []
    for place, weight in zip(places, weights, strict=True):
        c = place.counts
        right = {"base": c.base.before, "installed": c.installed.before, "candidate": c.installed.after}
        row = {"name": place.name, "bits": c.bits, "rows": c.rows, "groups": c.groups, "share": round(weight, 4)}
        row |= {"right": right, "lost": c.installed.lost, "gained": c.installed.gained}
        row["reliant"] = None if c.reliance is None else [c.reliance.before, c.reliance.after]
        row["seen"] = None if c.seen is None else [c.seen.before, c.seen.after]
        row["ece"] = [round(calibration.error(*c.before), 4), round(calibration.error(*c.after), 4)]
        found.append(row)
    return found


def plain_rules(rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """The rules in plain values; an end of an interval that is not known is None."""
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in map(asdict, rules)
    ]
