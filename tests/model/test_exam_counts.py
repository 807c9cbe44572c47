"""Counts of an examination: the difference and its variance are those of the rows; impossible counts are refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from model import exam, exam_counts, metrics
from model.exam import Marks
from model.exam_counts import Counts, CountsWrong


def marks(seed: int, rows: int = 300, share: float = 0.6) -> Marks:
    draw = np.random.default_rng(seed)
    right = [bool(value) for value in draw.random(rows) < share]
    return Marks(right, list(draw.random(rows)), [bool(value) for value in draw.random(rows) < 0.7])


def counts(seed: int = 0, rows: int = 300, pictures: int = 40) -> Counts:
    groups = [f"p{number}" for number in np.random.default_rng(seed).integers(0, pictures, rows)]
    return exam.count(marks(seed, rows), marks(seed + 1, rows), marks(seed + 2, rows, 0.65), groups, 4)


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_from_counts_is_the_bootstrap_over_pictures(seed: int) -> None:
    """Against `metrics.interval`, which has the rows: 10,000 draws of whole pictures."""
    draw = np.random.default_rng(seed)
    groups = [f"p{number}" for number in draw.integers(0, 60, 400)]
    luck = {name: draw.normal(0, 0.2) for name in set(groups)}  # rows of one picture go together
    before = [bool(draw.random() < 0.5 + luck[group]) for group in groups]
    after = [bool(draw.random() < 0.6 - luck[group]) for group in groups]
    none = Marks(before, [0.5] * 400, None)
    found = exam.count(none, none, Marks(after, [0.5] * 400, None), groups, 4)
    mean, variance = exam_counts.difference(found, found.installed)
    delta = np.array(after, dtype=float) - np.array(before, dtype=float)
    span = metrics.interval(delta, groups)
    assert span is not None and mean == pytest.approx(delta.mean())
    assert 2 * 1.96 * variance**0.5 == pytest.approx(span[1] - span[0], rel=0.06)
    assert found.reliance is None


def test_a_record_comes_back_as_it_was() -> None:
    assert exam_counts.read(counts().record()) == counts()
    without = dataclasses.replace(counts(), reliance=None, seen=None)
    assert exam_counts.read(without.record()) == without


def test_only_whole_numbers_leave_and_none_of_a_single_row() -> None:
    record = counts().record()
    values = [value for entry in record.values() for value in (entry if isinstance(entry, list) else [entry])]
    assert all(type(value) is int for value in values)
    assert len(values) == 4 + 4 * 6 + 4 * 150  # however many rows there are


def changed(name: str, value: Any) -> dict[str, Any]:
    return {**counts().record(), name: value}


def one_picture() -> dict[str, Any]:
    """Counts of thirty questions on one picture, which fit each other and have no spread to judge by."""
    alike, same = Marks([True] * 30, [0.5] * 30, [True] * 30), ["p"] * 30
    return dict(exam.count(alike, alike, alike, same, 4).record())


BAD: dict[str, dict[str, Any]] = {
    "a fraction": changed("rows", 300.0),
    "truth": changed("rows", True),
    "no rows": changed("rows", 0),
    "a single picture": one_picture(),
    "more rows than believed": changed("rows", 10**9),
    "more pictures than rows": changed("groups", 301),
    "sizes that do not fit": changed("squares", 299),
    "more right than rows": changed("installed", [301, 301, 0, 0, 0, 0]),
    "a change out of nothing": changed("installed", [100, 200, 0, 0, 0, 0]),
    "negative": changed("base", [-1, -1, 0, 0, 0, 0]),
    "too short": changed("base", [1, 1]),
    "text": changed("reliance", "many"),
    "one of two": {key: value for key, value in counts().record().items() if key != "seen"},
    "more seen than reliant": changed("seen", [250, 250, 0, 0, 0, 0]),
    "cells that do not fit": changed("cells-after", [0] * 150),
    "another entry": changed("patient", 7),
    "nothing": {},
}


@pytest.mark.parametrize("kind", BAD)
def test_counts_that_cannot_be_are_refused(kind: str) -> None:
    with pytest.raises(CountsWrong):
        exam_counts.read(BAD[kind])
