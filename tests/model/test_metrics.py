"""Conformance of the strict scorer: adversarial answers with the verdict a careful reader would give."""

import json
import subprocess
import sys

import numpy as np
import pytest

from model import metrics
from model.metrics import Row

CONFORMANCE = [
    # answer, reference, right?
    ("Yes", "yes", True),
    ("yes.", "Yes", True),
    ("  YES ! ", "yes", True),
    ("\uff39\uff25\uff33", "yes", True),  # full-width letters
    ('"Left  Lung"', "left lung", True),
    ("Transverse  Plane", "Transverse Plane", True),
    ("yes, not known", "yes", False),
    ("yes and no", "yes", False),
    ("no", "not", False),
    ("normal", "no", False),
    ("I do not know", "no", False),
    ("nodule", "no", False),
    ("", "no", False),
    ("   ", "no", False),
    (".", "no", False),
    (None, "no", False),
    (2, "2", True),
    ("2", 2, True),
    ("two", "2", False),
    ("2.0", "2", False),
    ("0", "None", False),
    ("the lung", "lung", False),
    ("lung", "left lung", False),
    ("left lung", "lung", False),
    ("lung left", "left lung", False),
    ("x ray", "X-Ray", False),
    ("-5", "5", False),
    ("50%", "50", False),
    ("", "", False),
]


@pytest.mark.parametrize(("answer", "reference", "right"), CONFORMANCE)
def test_exact_match_gives_the_careful_readers_verdict(answer: object, reference: object, right: bool) -> None:
    assert metrics.exact(answer, reference) is right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CLOSED ", "closed"),
        ("close", "closed"),
        ("Closed", "closed"),
        (" OPEN", "open"),
        ("", "unknown"),
        (None, "unknown"),
        ("closed-ended", "unknown"),
        (3, "unknown"),
    ],
)
def test_every_spelling_of_the_answer_type(text: object, expected: str) -> None:
    assert metrics.kind(text) == expected


def test_recall_and_f1_count_repetitions() -> None:
    assert metrics.recall_f1("left left right", "left right right") == pytest.approx((2 / 3, 2 / 3))
    assert metrics.recall_f1("lung lung lung", "lung, heart") == pytest.approx((0.5, 0.4))
    assert metrics.recall_f1("", "lung") == (0.0, 0.0)
    assert metrics.recall_f1("nodule", "no") == (0.0, 0.0)


def test_rows_are_matched_by_id_and_every_misfit_is_counted() -> None:
    references = [Row(str(i), "yes", None, "CLOSED ", group=f"g{i}") for i in range(5)]
    answers = [("4", "yes"), ("0", "yes"), ("0", "Yes."), ("1", "yes"), ("1", "no"), ("9", "yes"), ("2", "")]
    rows, counts = metrics.match(references, answers)
    report = metrics.score(rows, counts=counts, resamples=200)
    assert counts == {"missing": 1, "conflicting": 1, "duplicates": 2, "unmatched": 1}
    assert report.all is not None and report.all.percent == pytest.approx(40.0)
    assert set(report.wrong) == {"1", "2", "3"}
    assert report.closed == report.all and report.open is None


def test_two_questions_of_one_id_are_refused() -> None:
    with pytest.raises(metrics.ScoreError, match="'7'"):
        metrics.match([Row("7", "a", None), Row("7", "b", None)], [])


def test_parts_unknown_types_and_empty_references() -> None:
    rows = [
        Row("1", "yes", "yes", "closed", "a", "Organ"),
        Row("2", "left lung", "lung", "OPEN", "a", "Position"),
        Row("3", "ct", "ct", "?", "b", "Organ"),
        Row("4", " ", "ct", "open", "b"),
    ]
    report = metrics.score(rows, resamples=200)
    assert report.all is not None and report.rows == 3 and report.all.percent == pytest.approx(200 / 3)
    assert report.unknown is not None and report.unknown.rows == 1
    assert report.open_recall is not None and report.open_recall.percent == pytest.approx(50.0)
    assert report.open_f1 is not None and report.open_f1.percent == pytest.approx(200 / 3)
    assert report.by_topic["Organ"].rows == 2
    assert report.empty_references == 1 and report.images == 2
    assert report.closed is not None and report.closed.low is None, "one image alone has no interval"


def test_no_rows_at_all() -> None:
    report = metrics.score([])
    assert report.all is None and report.rows == 0 and report.by_topic == {}


def test_interval_is_clustered_by_image() -> None:
    """Ten copies of each image's row must not narrow the interval: only images count."""
    rng = np.random.default_rng(0)
    values = (rng.random(60) < 0.7).astype(float)
    groups = [f"image{i}" for i in range(60)]
    single = metrics.interval(values, groups)
    tenfold = metrics.interval(np.repeat(values, 10), [g for g in groups for _ in range(10)])
    assert single is not None and tenfold is not None
    assert tenfold == pytest.approx(single)
    normal = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 60)
    assert single[1] - single[0] == pytest.approx(2 * normal, rel=0.1)


def test_interval_is_the_same_for_the_same_answers() -> None:
    values, groups = np.array([1.0, 0, 1, 1]), ["a", "a", "b", "c"]
    assert metrics.interval(values, groups) == metrics.interval(values, groups)


def test_flips_say_what_was_lost_and_gained() -> None:
    before = [Row(str(i), "yes", text, "closed", f"g{i}") for i, text in enumerate(["yes", "yes", "no", "maybe"])]
    after = [Row(str(i), "yes", text, "closed", f"g{i}") for i, text in enumerate(["yes", "no", "yes", "no"])]
    found = metrics.flips(before, after[:4], resamples=200)
    assert (found["lost"], found["gained"], found["changed"], found["difference"]) == (1, 1, 3, 0.0)
    assert found["lost_ids"] == ["1"] and found["gained_ids"] == ["2"]
    assert metrics.flips(before, after[:2], resamples=200)["only_before"] == 2


def test_report_becomes_plain_json_types() -> None:
    report = metrics.score([Row("1", "yes", "yes", "closed", "a"), Row("2", "no", "yes", "closed", "b")], resamples=100)
    assert json.loads(json.dumps(report.to_dict()))["all"]["percent"] == 50.0


def test_scoring_imports_no_torch() -> None:
    code = "import sys, model.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
