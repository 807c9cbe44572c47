"""Tests of model/phantoms.py: exact answers, the same bytes for the same seed, no answer from the question alone."""

import dataclasses
import hashlib
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from model import phantom_questions, phantoms
from model.data import Sample
from model.phantoms import CLINICS, SCANNERS

STANDARD = [name for name, scanner in SCANNERS.items() if scanner.standard]
UNSEEN = [name for name, scanner in SCANNERS.items() if not scanner.standard]


def cases(count: int, scanner: str = "plain", seed: int = 0, **given: object) -> list[phantoms.Case]:
    """Cases with a lesion, without the scanner's random tilt."""
    still = dataclasses.replace(SCANNERS[scanner], tilt=0.0, tilt_spread=0.0)
    rng = np.random.default_rng(seed)
    found: list[phantoms.Case] = []
    while len(found) < count:
        case = phantoms.draw_case(rng, {scanner: 1.0}, **given)  # type: ignore[arg-type]
        if case.finding is not None:
            found.append(dataclasses.replace(case, scanner=still))
    return found


def changed(case: phantoms.Case, size: int = 160) -> np.ndarray:
    """Where the lesion's pixels are: the same body with it and without it."""
    healthy = dataclasses.replace(case, finding=None)
    difference = phantoms.render(case, size).astype(int) - phantoms.render(healthy, size).astype(int)
    return np.where(np.abs(difference) > 12, np.abs(difference), 0)[:, :, 0]


def questions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phantoms, "render", lambda case, size: np.zeros((1, 1, 3), np.uint8))


def prior(known: list[Sample], asked: list[Sample]) -> float:
    """Percent answered rightly by the usual answer to the same question in other pictures."""
    usual: dict[str, Counter[str]] = defaultdict(Counter)
    for row in known:
        usual[row.question][row.answer] += 1
    right = [bool(usual[r.question]) and usual[r.question].most_common(1)[0][0] == r.answer for r in asked]
    return 100 * sum(right) / len(right)


@pytest.mark.parametrize("organ", ["chest", "abdomen", "brain"])
def test_the_lesion_lies_on_the_side_that_the_answer_names(organ: str) -> None:
    for case in cases(25, organs={organ: 1.0}):
        left_of_picture, right_of_picture = (half.sum() for half in np.array_split(changed(case), 2, axis=1))
        assert left_of_picture + right_of_picture > 0, case
        share = right_of_picture / (left_of_picture + right_of_picture)
        assert share > 0.95 if case.side == "left" else share < 0.05, case


@pytest.mark.parametrize(("scanner", "swapped"), [("mirrored", True), ("upside_down", True), ("inverted", False)])
def test_a_mirrored_picture_has_the_lesion_on_the_other_half_and_the_same_answer(scanner: str, swapped: bool) -> None:
    for case in cases(12, scanner, organs={"chest": 1.0, "brain": 1.0}):
        halves = [half.sum() for half in np.array_split(changed(case), 2, axis=1)]
        assert (halves[1] > halves[0]) == ((case.side == "left") != swapped), case


@pytest.mark.parametrize("organ", ["chest", "brain", "hand"])
def test_the_lesion_lies_in_the_zone_that_the_answer_names(organ: str) -> None:
    for case in cases(25, organs={organ: 1.0}):
        if case.finding is None or case.finding.kind == "effusion":
            continue
        top, bottom = (part.sum() for part in np.split(changed(case), [110 if organ == "hand" else 80], axis=0))
        assert (top > bottom) == (case.finding.zone in ("upper", "front", "fingers")), case


def test_the_thumb_of_a_right_hand_points_to_the_left_of_the_picture() -> None:
    for case in cases(10, organs={"hand": 1.0}):
        picture = phantoms.render(dataclasses.replace(case, finding=None))[:, :, 0].astype(int)
        outer = picture[60:100, :40].sum() - picture[60:100, -40:].sum()
        assert (outer > 0) == (case.side == "right"), case


def test_large_lesions_are_larger_than_small_ones() -> None:
    for case in cases(30):
        if case.finding is None or not case.finding.size:
            continue
        areas = [
            (
                changed(dataclasses.replace(case, finding=dataclasses.replace(case.finding, size=size, count=1))) > 0
            ).sum()
            for size in ("small", "large")
        ]
        assert areas[1] > 1.4 * areas[0], case


@pytest.mark.parametrize("organ", ["chest", "hand"])
def test_as_many_lesions_are_drawn_as_counted(organ: str) -> None:
    for case in cases(40, organs={organ: 1.0}, lesions={"effusion": 0.0, "pneumonia": 0.0, "fracture": 0.0}):
        assert case.finding is not None
        one = (changed(dataclasses.replace(case, finding=dataclasses.replace(case.finding, count=1))) > 0).sum()
        all_of_them = (changed(case) > 0).sum()
        assert 0.6 * case.finding.count < all_of_them / one < 1.5 * case.finding.count, case


def test_every_lesion_can_be_seen_and_leaves_the_rest_of_the_picture_alone() -> None:
    for case in cases(120):
        area = (changed(case) > 0).mean()
        assert 0.0006 < area < 0.12, case


def test_every_row_is_a_complete_sample() -> None:
    rows = phantoms.make(30, [*STANDARD, *UNSEEN], seed=3, size=48)
    per_picture = Counter(row.group for row in rows)
    assert len(per_picture) == 30 and set(per_picture.values()) <= {6, 7, 8, 9}
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        assert isinstance(row.image, np.ndarray) and row.image.shape == (48, 48, 3) and row.image.dtype == np.uint8
        assert set(row.meta) == {"scanner", "organ", "modality", "side", "lesion", "topic"}
        assert row.question.endswith("?") and "{" not in row.question and "  " not in row.question and row.answer
        assert (row.answer_type == "closed") == (row.answer in ("Yes", "No"))
        assert row.source == "phantoms" and row.history == ()


def test_answers_about_sides_agree_with_the_drawn_side(monkeypatch: pytest.MonkeyPatch) -> None:
    questions_only(monkeypatch)
    for row in phantoms.make(400, STANDARD + UNSEEN, seed=9):
        topic, side = row.meta["topic"], row.meta["side"]
        other = "right" if side == "left" else "left"
        if topic in ("side", "hand"):
            assert row.answer.lower() == side
        elif topic == "clear":
            assert row.answer.lower() == other
        elif topic in ("side closed", "hand closed"):
            assert (row.answer == "Yes") == (side in row.question), row.question
        elif topic == "clear closed":
            assert (row.answer == "Yes") == (other in row.question), row.question


def test_all_topics_organs_and_lesions_are_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    questions_only(monkeypatch)
    rows = phantoms.make(800, STANDARD, seed=5)
    assert {row.meta["topic"] for row in rows} == set(phantom_questions.WORDINGS)
    assert {row.meta["organ"] for row in rows} == set(phantom_questions.ORGANS)
    assert {row.meta["modality"] for row in rows} == set(phantom_questions.MODALITIES)
    assert len({row.meta["lesion"] for row in rows}) == 10


def test_the_question_alone_is_a_weak_guide_to_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    questions_only(monkeypatch)
    assert prior(phantoms.make(1500, STANDARD, seed=1), phantoms.make(1500, STANDARD, seed=2)) < 50
    for name in CLINICS:
        known, asked = (phantoms.clinic_samples(name, 1500, seed) for seed in (1, 2))
        assert prior(known, asked) < 53, name


def test_a_clinic_has_unseen_looks_only_and_asks_about_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    questions_only(monkeypatch)
    for name in CLINICS:
        rows = phantoms.clinic_samples(name, 500, seed=4)
        topics = Counter(row.meta["topic"] for row in rows)
        assert topics["modality"] + topics["organ"] > 0.4 * len(rows), name
        assert set(topics) == set(phantom_questions.WORDINGS), name
        assert all(not SCANNERS[row.meta["scanner"]].standard for row in rows)


def test_clinics_differ_in_their_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    questions_only(monkeypatch)
    usual = [
        Counter(row.meta["organ"] for row in phantoms.clinic_samples(name, 400, 6)).most_common(1) for name in CLINICS
    ]
    assert len(CLINICS) == 3 and len({most[0][0] for most in usual}) == 3


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    first, again, other = (phantoms.make(12, STANDARD + UNSEEN, seed, size=64) for seed in (7, 7, 8))
    assert [(r.id, r.question, r.answer) for r in first] == [(r.id, r.question, r.answer) for r in again]
    assert digest(first) == digest(again) != digest(other)
    assert digest(first[: len(first) // 2]) == digest(phantoms.make(12, STANDARD + UNSEEN, 7, 64)[: len(first) // 2])


def digest(rows: list[Sample]) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(f"{row.id}|{row.question}|{row.answer}|".encode() + np.asarray(row.image).tobytes())
    return total.hexdigest()


def test_the_bytes_of_a_small_batch_are_pinned() -> None:
    rows = phantoms.make(8, STANDARD + UNSEEN, seed=2026, size=64)
    assert digest(rows) == "d4fd5ced784afde83fe266b43d957c41f760aec0ca8e8f2530d3959c87781139"


def test_a_scanner_or_clinic_that_does_not_exist_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="No scanner is called 'x'; there are: plain"):
        phantoms.make(1, ["x"], seed=0)
    with pytest.raises(ValueError, match="No organ is called"):
        phantoms.make(1, ["plain"], seed=0, organs={"toe": 1.0})
    with pytest.raises(ValueError, match="No scanner is given"):
        phantoms.make(1, [], seed=0)
    with pytest.raises(ValueError, match="there are: lakeside"):
        phantoms.clinic_samples("nowhere", 1, seed=0)


def test_phantoms_need_no_torch() -> None:
    code = (
        "import sys; from model import phantoms; phantoms.make(1, ['plain'], 0, 32); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_contact_sheet_shows_every_unseen_scanner(tmp_path) -> None:  # type: ignore[no-untyped-def]
    phantoms.sheet(tmp_path / "sheet.png", size=32, columns=2)
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (64, 32 * (6 + len(UNSEEN)))
