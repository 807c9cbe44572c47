"""The consent gate: what is reviewed and consented reaches the training folder, and what is withdrawn leaves it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kiosk import export, queries
from kiosk.store import CaseStore
from model.data import read_training
from tests.kiosk.conftest import picture
from tests.kiosk.fakes import answer
from tests.kiosk.folders import image_names, names, reviewed


def test_a_correction_with_consent_becomes_a_sample_the_client_reads(store: CaseStore, afya_home: Path) -> None:
    case_id, turn_id = reviewed(store, afya_home)
    export.review(store, afya_home, turn_id, "corrected", "NA", "no, dark")
    assert export.reconcile(store, afya_home).samples == 0
    export.set_consent(store, afya_home, case_id, "training", "NA", True)
    (sample,) = read_training(afya_home / "training")
    assert (sample.question, sample.answer, sample.answer_type) == ("Is it bright?", "no, dark", "open")
    assert isinstance(sample.image, Path) and sample.image.read_bytes() == picture(200).png
    row = json.loads((afya_home / "training" / "samples" / f"{sample.id}.json").read_text())
    assert row["source"] == "kiosk" and row["group"] == sample.image.stem and row["consented_at"].endswith("Z")


def test_withdrawal_removes_the_files_before_it_is_saved(
    store: CaseStore, afya_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case_id, _ = reviewed(store, afya_home)
    export.set_consent(store, afya_home, case_id, "training", "NA", True)
    assert len(names(afya_home)) == len(image_names(afya_home)) == 1
    seen: list[set[str]] = []
    save = store.add_consent

    def add_consent(*decision: Any) -> None:
        seen.append(names(afya_home) | image_names(afya_home))
        save(*decision)

    monkeypatch.setattr(store, "add_consent", add_consent)
    export.set_consent(store, afya_home, case_id, "care", "NA")
    assert seen == [set()] and not names(afya_home) and not image_names(afya_home)


def test_a_picture_two_cases_share_stays_until_the_last_withdraws(store: CaseStore, afya_home: Path) -> None:
    first, _ = reviewed(store, afya_home)
    second, _ = reviewed(store, afya_home)
    for case_id in (first, second):
        export.set_consent(store, afya_home, case_id, "training", "NA", True)
    assert len(names(afya_home)) == 2 and len(image_names(afya_home)) == 1
    export.set_consent(store, afya_home, first, "care", "NA")
    assert len(names(afya_home)) == 1 and len(image_names(afya_home)) == 1
    export.set_consent(store, afya_home, second, "none", "NA")
    assert not names(afya_home) and not image_names(afya_home)


@pytest.mark.parametrize(
    ("kind", "fields", "looked", "leaves"),
    [
        ("DICOM", {"modality": "CT"}, False, True),
        ("DICOM", {"modality": "CT", "burned_in_annotation": "YES"}, True, False),
        ("DICOM", {"modality": "US"}, False, False),
        ("DICOM", {"modality": "US"}, True, True),
        ("DICOM", {"modality": "US", "burned_in_annotation": "NO"}, False, True),
        ("JPEG", {}, False, False),
        ("JPEG", {}, True, True),
    ],
)
def test_writing_in_the_picture_keeps_it_out(
    store: CaseStore, afya_home: Path, kind: str, fields: dict[str, str | int | float], looked: bool, leaves: bool
) -> None:
    case_id, turn_id = store.add_case(replace(picture(200), format=kind, fields=fields), "NA", "Is it bright?")
    store.answer_turn(turn_id, answer("yes"))
    export.review(store, afya_home, turn_id, "confirmed", "NA")
    export.set_consent(store, afya_home, case_id, "training", "NA", looked)
    assert len(names(afya_home)) == len(image_names(afya_home)) == export.reconcile(store, afya_home).samples == leaves
    (row,) = queries.trainable(store)
    assert (export.held_back(row) is None) == leaves
    export.set_consent(store, afya_home, case_id, "training", "NA", False)  # said again, without having looked
    assert len(names(afya_home)) == (leaves and not export.needs_look(kind, fields))


def test_a_name_in_a_question_or_correction_keeps_it_out(store: CaseStore, afya_home: Path) -> None:
    case_id, turn_id = reviewed(store, afya_home)
    export.set_consent(store, afya_home, case_id, "training", "NA", True)
    export.review(store, afya_home, turn_id, "corrected", "NA", "same as Mrs Achieng in 12/03/2024")
    assert not names(afya_home) and not image_names(afya_home)
    (row,) = queries.trainable(store)
    assert "seems to name a person" in (export.held_back(row) or "")
    export.review(store, afya_home, turn_id, "corrected", "NA", "a nodule")
    assert len(names(afya_home)) == 1


def test_reconcile_repairs_what_a_hand_or_a_crash_left(store: CaseStore, afya_home: Path) -> None:
    case_id, _ = reviewed(store, afya_home)
    export.set_consent(store, afya_home, case_id, "training", "NA", True)
    folder = afya_home / "training"
    (folder / "samples" / "case-9-turn-9.json").write_text('{"image": "images/x.png"}')
    (folder / "samples" / "notes.txt").write_text("left here")
    (folder / "samples" / ".case-1.json.abc.partial").write_text("{")
    (folder / "images" / "x.png").write_bytes(b"a stranger")
    (folder / "samples" / f"{min(names(afya_home) - {'case-9-turn-9'})}.json").write_text("{ half of it")
    changes = export.reconcile(store, afya_home)
    assert (changes.written, changes.removed, changes.samples) == (1, 1, 1)
    assert len(read_training(folder)) == len(list((folder / "samples").iterdir())) == len(image_names(afya_home)) == 1
    assert export.reconcile(store, afya_home).written == 0


def test_a_damaged_picture_stays_out_and_stops_nothing(store: CaseStore, afya_home: Path) -> None:
    case_id, _ = reviewed(store, afya_home)
    other, _ = reviewed(store, afya_home, 40)
    for number in (case_id, other):
        export.set_consent(store, afya_home, number, "training", "NA", True)
    with store.reading() as db:
        db.execute("update cases set image = zeroblob(9) where id = ?", [case_id])
    changes = export.reconcile(store, afya_home)
    assert (changes.damaged, changes.samples, changes.removed) == ((case_id,), 1, 1)
    assert len(read_training(afya_home / "training")) == 1


@pytest.mark.parametrize(
    ("question", "text", "kind"),
    [
        ("Is it there?", "Yes", "closed"),
        ("Is it there?", "no.", "closed"),
        ("Is it left or right?", "Left", "closed"),
        ("Left lung or right lung?", "right lung", "closed"),
        ("Which organ?", "heart", "open"),
        ("CT or MRI?", "X-ray", "open"),
        ("Is it there?", "yes, a large one", "open"),
        ("This or that?", "", "open"),
    ],
)
def test_answer_type_is_inferred(question: str, text: str, kind: str) -> None:
    assert export.answer_type(question, text) == kind
