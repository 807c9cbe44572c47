"""Strict scoring of short medical answers: exact match, token recall and F1, intervals clustered by image.

Rows are matched by id, never by position. A closed or open answer is right only if the *whole* normalised answer
equals the whole normalised reference: "yes, not known" is wrong where "yes" is expected, and "normal" does not contain
a "no". A question without an answer is wrong. What `normalise` forgives is listed there and nothing else is forgiven:
no articles are dropped, no number words turned into digits, no synonyms, no substrings.

Not covered: synonyms, medical meaning, long reports, calibration; Chinese text counts as one token per run of
characters. Imports no torch.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

RESAMPLES = 10_000
SEED = 20_260_101
_EDGE = " \t\r\n.,;:!?\"'`()[]{}<>*_~|/\\\u2026\u201c\u201d\u2018\u2019\u00ab\u00bb\u3002\u3001"
_TOKEN = re.compile(r"[^\W_]+(?:[.\-'][^\W_]+)*")


class ScoreError(ValueError):
    """The rows cannot be scored; the message says which and why."""


@dataclass(frozen=True)
class Row:
    """One question with its reference and the answer given (None: no answer came, or two different ones)."""

    id: str
    reference: str
    answer: str | None
    answer_type: str = "unknown"
    group: str = ""
    topic: str = ""


@dataclass(frozen=True)
class Estimate:
    """A mean over rows in percent with its 95 % interval (None where fewer than two images stand behind it)."""

    rows: int
    percent: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        span = "" if self.low is None else f" [{self.low:.1f}, {self.high:.1f}]"
        return f"{self.percent:.1f} %{span} of {self.rows}"


@dataclass(frozen=True)
class Report:
    """Scores of one set of answers. `all` covers closed, open and unknown rows; a part without rows is None.

    `missing` rows (no answer) and `conflicting` ones (answered twice, differently) are wrong; `duplicates` counts
    surplus answers, `unmatched` answers to ids that are not in the data, `empty_references` rows left out because
    nothing could be right.
    """

    all: Estimate | None
    closed: Estimate | None
    open: Estimate | None
    unknown: Estimate | None
    open_recall: Estimate | None
    open_f1: Estimate | None
    by_topic: dict[str, Estimate]
    rows: int
    images: int
    missing: int = 0
    conflicting: int = 0
    duplicates: int = 0
    unmatched: int = 0
    empty_references: int = 0
    wrong: tuple[str, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, object]:
        """Plain types for JSON, without the ids of the wrong rows (those are in answers.jsonl)."""
        out = asdict(self)
        del out["wrong"]
        return out


def normalise(text: object) -> str:
    """The form in which answers are compared.

    NFKC, lower case, runs of white space as one space, surrounding spaces and sentence punctuation, quotes or brackets
    removed. Kept, because they can carry meaning: articles, number words, hyphens, signs, percent signs, punctuation
    inside the answer. Anything that is not text (JSON integers) is written out first; None is the empty text.
    """
    if text is None:
        return ""
    plain = unicodedata.normalize("NFKC", str(text)).lower()
    return " ".join(plain.split()).strip(_EDGE)


def kind(answer_type: object) -> str:
    """One of closed, open or unknown, from any spelling in use ("CLOSED ", "close", "Open")."""
    word = normalise(answer_type)
    if word in ("closed", "close"):
        return "closed"
    return "open" if word == "open" else "unknown"


def exact(answer: object, reference: object) -> bool:
    """Whether the answer is the reference, both normalised; an empty answer or reference is never right."""
    given = normalise(answer)
    return bool(given) and given == normalise(reference)


def tokens(text: object) -> list[str]:
    """Words and numbers of the normalised text; "x-ray" and "1.5" stay whole, commas vanish."""
    return _TOKEN.findall(normalise(text))


def recall_f1(answer: object, reference: object) -> tuple[float, float]:
    """Share of the reference's tokens found in the answer, and F1; both count repetitions (multisets), both in 0..1."""
    given, wanted = Counter(tokens(answer)), Counter(tokens(reference))
    shared = sum((given & wanted).values())
    if not shared:
        return 0.0, 0.0
    recall, precision = shared / wanted.total(), shared / given.total()
    return recall, 2 * precision * recall / (precision + recall)


def match(references: Sequence[Row], answers: Iterable[tuple[str, object]]) -> tuple[list[Row], dict[str, int]]:
    """Put each answer `(id, text)` beside its reference; returns the rows and the counts of what did not fit.

    Of an id answered twice alike the first counts; answered twice differently it has no answer. Raises ScoreError when
    two references share an id.
    """
    seen = Counter(row.id for row in references)
    doubled = [key for key, times in seen.items() if times > 1]
    if doubled:
        raise ScoreError(
            f"{len(doubled)} ids stand for several questions, first {doubled[0]!r}; give each row its own id."
        )
    given: dict[str, list[object]] = defaultdict(list)
    for key, text in answers:
        given[str(key)].append(text)
    rows, counts = [], {"missing": 0, "conflicting": 0, "duplicates": 0}
    for row in references:
        texts = given.pop(row.id, [])
        conflict = len({normalise(text) for text in texts}) > 1
        counts["missing"] += not texts
        counts["conflicting"] += conflict
        counts["duplicates"] += max(0, len(texts) - 1)
        answer = None if conflict or not texts else str(texts[0])
        rows.append(Row(row.id, row.reference, answer, row.answer_type, row.group, row.topic))
    counts["unmatched"] = sum(len(texts) for texts in given.values())
    return rows, counts


def interval(
    values: np.ndarray, groups: Sequence[str], resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float] | None:
    """95 % percentile bootstrap of the mean of `values` (n,), resampling whole groups (images); None below two groups.

    Rows of one image are not independent, so images are drawn, not rows. Where every value is equal the interval is
    that value: a known limit of the bootstrap, not certainty.
    """
    names, index = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2:
        return None
    sums = np.stack([np.bincount(index, values, len(names)), np.bincount(index, minlength=len(names)).astype(float)], 1)
    rng = np.random.default_rng(seed)
    step = max(1, 4_000_000 // len(names))  # at most 32 MB of draws at a time
    means = []
    for start in range(0, resamples, step):
        draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=min(step, resamples - start))
        totals = draws @ sums
        means.append(totals[:, 0] / totals[:, 1])
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def estimate(values: Sequence[float], groups: Sequence[str], resamples: int = RESAMPLES) -> Estimate | None:
    """Mean of values in 0..1 as percent with its interval, None for no values."""
    if not len(values):
        return None
    data = np.asarray(values, dtype=float)
    span = interval(data, groups, resamples)
    low, high = (None, None) if span is None else (100 * span[0], 100 * span[1])
    return Estimate(len(data), 100 * float(data.mean()), low, high)


def score(rows: Iterable[Row], *, counts: Mapping[str, int] | None = None, resamples: int = RESAMPLES) -> Report:
    """Score matched rows; `counts` are those `match` returned (without them, missing answers are counted here)."""
    given = list(rows)
    usable = [row for row in given if normalise(row.reference)]
    right = np.array([exact(row.answer, row.reference) for row in usable], dtype=float)
    groups = np.array([row.group or row.id for row in usable], dtype=object)
    kinds = np.array([kind(row.answer_type) for row in usable], dtype=object)
    topics = np.array([row.topic for row in usable], dtype=object)
    overlap = np.array([recall_f1(row.answer, row.reference) for row in usable], dtype=float).reshape(-1, 2)

    def part(values: np.ndarray, where: np.ndarray) -> Estimate | None:
        return estimate(values[where], groups[where], resamples)

    known = {"missing": sum(row.answer is None for row in given), **(counts or {})}
    return Report(
        all=part(right, np.ones(len(usable), dtype=bool)),
        closed=part(right, kinds == "closed"),
        open=part(right, kinds == "open"),
        unknown=part(right, kinds == "unknown"),
        open_recall=part(overlap[:, 0], kinds == "open"),
        open_f1=part(overlap[:, 1], kinds == "open"),
        by_topic={name: found for name in sorted(set(topics) - {""}) if (found := part(right, topics == name))},
        rows=len(usable),
        images=len(set(groups)),
        empty_references=len(given) - len(usable),
        wrong=tuple(row.id for row, good in zip(usable, right, strict=True) if not good),
        **known,
    )


def average(runs: Sequence[Sequence[Row]], resamples: int = RESAMPLES) -> dict[str, Estimate | None]:
    """Mean exact match of several runs (seeds) over the same rows, in the same order: all, closed and open.

    A row counts with the share of runs that had it right; images are resampled, runs are not, so the interval says how
    far other images would move the mean, not other seeds. Raises `ScoreError` where the rows differ.
    """
    if len({tuple((row.id, normalise(row.reference)) for row in rows) for rows in runs}) != 1:
        raise ScoreError("The runs do not answer the same rows; give answers to one dataset.")
    usable = [place for place, row in enumerate(runs[0]) if normalise(row.reference)]
    right = np.array([[exact(rows[n].answer, rows[n].reference) for n in usable] for rows in runs], dtype=float)
    groups = [runs[0][n].group or runs[0][n].id for n in usable]
    kinds = [kind(runs[0][n].answer_type) for n in usable]
    found: dict[str, Estimate | None] = {}
    for name in ("all", "closed", "open"):
        chosen = [place for place in range(len(usable)) if name in ("all", kinds[place])]
        found[name] = estimate(right.mean(0)[chosen], [groups[place] for place in chosen], resamples)
    return found


def flips(before: Sequence[Row], after: Sequence[Row], *, resamples: int = RESAMPLES) -> dict[str, object]:
    """What changed between two sets of answers to the same questions, matched by id; rows in only one set are counted.

    `lost`: right before, wrong after; `gained`: the reverse; `changed`: another normalised answer; `difference`:
    percentage points after - before over the shared rows, with its 95 % interval over images.
    """
    old = {row.id: row for row in before}
    shared = [(old[row.id], row) for row in after if row.id in old]
    pairs = [(exact(a.answer, a.reference), exact(b.answer, b.reference)) for a, b in shared]
    delta = np.array([float(b) - float(a) for a, b in pairs])
    span = interval(delta, [b.group or b.id for _, b in shared], resamples) if shared else None
    return {
        "rows": len(shared),
        "only_before": len(old) - len(shared),
        "only_after": len(after) - len(shared),
        "lost": sum(a and not b for a, b in pairs),
        "gained": sum(b and not a for a, b in pairs),
        "changed": sum(normalise(a.answer) != normalise(b.answer) for a, b in shared),
        "difference": round(100 * float(delta.mean()), 3) if shared else 0.0,
        "difference_low": None if span is None else round(100 * span[0], 3),
        "difference_high": None if span is None else round(100 * span[1], 3),
        "lost_ids": [b.id for (_, b), (x, y) in zip(shared, pairs, strict=True) if x and not y],
        "gained_ids": [b.id for (_, b), (x, y) in zip(shared, pairs, strict=True) if y and not x],
    }
