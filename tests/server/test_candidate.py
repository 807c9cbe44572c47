"""The rules for a candidate, from counts made of rows: better, equal, worse, blind, overconfident; few rows or many."""

import numpy as np
import pytest

from model import exam
from model.exam import Marks
from server import candidate
from server.candidate import Place, Thresholds

LIMITS = Thresholds()


def place(
    name: str = "north",
    rows: int = 600,
    installed: float = 0.7,
    after: float = 0.7,
    *,
    blind: float = 0.0,
    bold: float = 0.0,
    seed: int = 0,
) -> Place:
    """A place with 5 questions a picture; a share of rows is changed from what is installed to reach `after`."""
    draw = np.random.default_rng(seed)
    groups = [f"p{number // 5}" for number in range(rows)]
    luck = draw.random(rows)
    sure = np.full(rows, installed)
    reliant = draw.random(rows) < 0.8
    first = Marks(list(luck < installed), list(sure), list(reliant))
    chance = draw.random(rows)
    second = Marks(list(luck < after), list(np.clip(sure + bold, 0, 0.999)), list(reliant & (chance >= blind)))
    return Place(name, exam.count(first, first, second, groups, 4))


def broken(*places: Place, limits: Thresholds = LIMITS) -> list[tuple[str, str]]:
    return [(rule.what, rule.place) for rule in candidate.judge(places, limits) if not rule.kept]


def test_better_and_equal_candidates_pass() -> None:
    assert broken(place(after=0.8, bold=0.1)) == []
    assert broken(place()) == []
    assert broken(place("north"), place("south", seed=1), place("west", rows=40, seed=2)) == []


def test_a_candidate_that_lowers_the_score_by_more_than_two_points_is_refused() -> None:
    """F7: with 600 rows three points count, whether beyond chance or not."""
    assert ("right answers", "all places") in broken(place(after=0.67))
    assert ("right answers against the bare model", "all places") in broken(place(after=0.67))


def test_a_candidate_that_is_worse_at_one_place_is_refused_however_good_it_is_elsewhere() -> None:
    found = broken(place("north", after=0.95), place("south", after=0.95, seed=1), place("west", after=0.5, seed=2))
    assert ("right answers", "west") in found and ("right answers", "all places") not in found


def test_a_candidate_that_looks_less_at_the_picture_is_refused() -> None:
    assert broken(place(blind=0.1)) == [("right answers that depend on the picture", "all places")]
    every = Thresholds(reliance="all")
    assert broken(place(blind=0.1), limits=every) == [("answers that depend on the picture", "all places")]
    assert broken(place(rows=40, blind=0.01)) == []


def test_an_overconfident_candidate_is_refused() -> None:
    assert broken(place(bold=0.15)) == [("calibration error", "all places")]


def test_with_few_rows_only_what_is_beyond_chance_counts() -> None:
    small = place(rows=40, after=0.675, seed=3)
    assert small.counts.installed.lost == 1 and broken(small) == []
    assert broken(small, limits=Thresholds(rows=1))
    assert broken(place(rows=40, after=0.2))


def test_one_large_place_does_not_decide_alone() -> None:
    places = [place("big", rows=50_000, after=0.72), *(place(n, after=0.6, seed=i) for i, n in enumerate("abc"))]
    total = candidate.total(places, lambda counts: counts.installed)
    assert total.mean < 0


def test_a_set_without_a_measure_of_reliance_is_judged_by_the_rest() -> None:
    import dataclasses

    bare = place()
    bare = Place("north", dataclasses.replace(bare.counts, reliance=None, seen=None))
    assert not [rule for rule in candidate.judge([bare], LIMITS) if "depend" in rule.what]
    assert candidate.judge([], LIMITS) == []


@pytest.mark.parametrize(("freedom", "value"), [(4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (1e9, 1.960)])
def test_the_quantile_is_that_of_the_tables(freedom: float, value: float) -> None:
    assert candidate.quantile(0.95, freedom) == pytest.approx(value, rel=0.01)
