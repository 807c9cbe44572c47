"""The consent gate: over random histories the training folder holds what was reviewed and consented, and no more."""

import atexit
import functools
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kiosk import export, queries
from kiosk.store import CaseStore, StoreError
from model.data import read_training
from tests.kiosk.conftest import picture
from tests.kiosk.fakes import answer

BRIGHTNESS = (40, 200)  # two pictures only, so that cases share one
QUESTIONS = st.sampled_from(["Is it bright?", "Is it bright?", "Is the lung of Mrs Achieng bright?"])
MOSTLY = st.sampled_from([True, True, True, False])


class PowerCut(BaseException):
    """The machine stops here."""


@functools.cache
def empty_database() -> Path:
    """A database with its tables, made once: making it anew for every history would only test the disk."""
    path = Path(tempfile.mkdtemp(prefix="afya-consent-")) / "kiosk.db"
    CaseStore(path).close()
    atexit.register(shutil.rmtree, path.parent)
    return path


def names(home: Path) -> set[str]:
    return {path.stem for path in (home / "training" / "samples").glob("*.json")}


def image_names(home: Path) -> set[str]:
    return {path.name for path in (home / "training" / "images").iterdir()}


def reviewed(store: CaseStore, home: Path, brightness: int = 200, **fields: str | int | float) -> tuple[int, int]:
    """A case with one confirmed answer."""
    case_id, turn_id = store.add_case(picture(brightness, **fields), "NA", "Is it bright?")
    store.answer_turn(turn_id, answer("yes"))
    export.review(store, home, turn_id, "confirmed", "NA")
    return case_id, turn_id


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
    monkeypatch.setattr(
        store, "add_consent", lambda *a: (seen.append(names(afya_home) | image_names(afya_home)), save(*a))
    )
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


class ConsentHistories(RuleBasedStateMachine):
    """Any order of questions, verdicts, consents and power cuts. The model is three dicts; the folder must follow."""

    @initialize()
    def open(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="afya-consent-"))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda _: None)  # cuts here are exceptions: nothing un-flushed is lost
        shutil.copy(empty_database(), self.home / "kiosk.db")
        self.store = CaseStore(self.home / "kiosk.db")
        with self.store.reading() as db:
            db.execute("pragma synchronous = off")
        export.reconcile(self.store, self.home)
        case_id, _ = reviewed(self.store, self.home, burned_in_annotation="NO")
        export.set_consent(self.store, self.home, case_id, "training", "NA", True)

    def teardown(self) -> None:
        self.patch.undo()
        self.store.close()
        shutil.rmtree(self.home)

    def turns(self) -> list[tuple[int, int]]:
        with self.store.reading() as db:
            return [(row["case_id"], row["id"]) for row in db.query("select id, case_id from turns")]

    @rule(brightness=st.sampled_from(BRIGHTNESS), burned=st.sampled_from(["NO", "YES"]), question=QUESTIONS)
    def ask(self, brightness: int, burned: str, question: str) -> None:
        _, turn_id = self.store.add_case(picture(brightness, burned_in_annotation=burned), "NA", question)
        self.store.answer_turn(turn_id, answer("yes"))

    @rule(data=st.data(), answered=st.booleans())
    def ask_more(self, data: st.DataObject, answered: bool) -> None:
        if turns := self.turns():
            turn_id = self.store.add_turn(data.draw(st.sampled_from(turns))[0], "And now?", "NA")
            if answered:
                self.store.answer_turn(turn_id, answer("no"))

    @rule(
        data=st.data(),
        state=st.sampled_from(["training", "training", "care", "none"]),
        looked=MOSTLY,
        cut=st.booleans(),
    )
    def decide(self, data: st.DataObject, state: str, looked: bool, cut: bool) -> None:
        if turns := self.turns():
            case_id, _ = data.draw(st.sampled_from(turns))
            args = (self.store, self.home, case_id, state, "NA", looked)
            self.perhaps_cut(cut, data, lambda: export.set_consent(*args))

    @rule(data=st.data(), verdict=st.sampled_from(["confirmed", "corrected", "rejected"]), cut=st.booleans())
    def judge(self, data: st.DataObject, verdict: str, cut: bool) -> None:
        if turns := self.turns():
            _, turn_id = data.draw(st.sampled_from(turns))
            words = (
                data.draw(st.sampled_from(["left", "right", "as with Mrs Achieng"])) if verdict == "corrected" else None
            )
            if queries.turn(self.store, turn_id).status != "answered":
                with pytest.raises(StoreError):
                    export.review(self.store, self.home, turn_id, verdict, "NA", words)
                return
            self.perhaps_cut(cut, data, lambda: export.review(self.store, self.home, turn_id, verdict, "NA", words))

    def perhaps_cut(self, cut: bool, data: st.DataObject, action: object) -> None:
        """Run an action, with the power failing before its k-th step on the disk; then check and start again."""
        assert callable(action)
        if not cut:
            action()
            return
        with pytest.MonkeyPatch.context() as patch:
            left = data.draw(st.integers(0, 4), label="steps before the power fails")

            def step(real: object) -> object:
                def counted(*args: object, **named: object) -> object:
                    nonlocal left
                    if left == 0:
                        raise PowerCut
                    left -= 1
                    assert callable(real)
                    return real(*args, **named)

                return counted

            for place, name in (
                (export, "write_atomic"),
                (Path, "unlink"),
                (CaseStore, "add_consent"),
                (CaseStore, "review"),
            ):
                patch.setattr(place, name, step(getattr(place, name)))
            try:
                action()
            except PowerCut:
                patch.undo()
                self.no_sample_without_consent()
        export.reconcile(self.store, self.home)  # what the next start does

    def no_sample_without_consent(self) -> None:
        """Even in the moment of the cut nothing is there that may not be."""
        rows = [row for row in queries.trainable(self.store) if export.held_back(row) is None]
        allowed = {f"case-{row.case_id}-turn-{row.turn_id}" for row in rows}
        assert names(self.home) <= allowed

    @invariant()
    def folder_is_what_was_decided(self) -> None:
        if not hasattr(self, "store"):
            return
        expected, pictures = {}, set()
        for case_id in {case_id for case_id, _ in self.turns()}:  # the rule in plain Python, not in the store's SQL
            case = queries.case(self.store, case_id)
            latest = case.consents[-1] if case.consents else None
            if latest is None or latest.state != "training" or not latest.looked:
                continue
            if case.fields["burned_in_annotation"] == "YES":
                continue
            for turn in case.turns:
                checked = turn.status == "answered" and turn.verdict in ("confirmed", "corrected")
                if checked and "Achieng" not in turn.question + turn.final_answer:
                    expected[f"case-{case.id}-turn-{turn.id}"] = turn.final_answer
                    pictures.add(f"{case.image_sha256}.png")
        samples = read_training(self.home / "training")
        assert {sample.id: sample.answer for sample in samples} == expected
        assert image_names(self.home) == pictures


TestConsentHistories = ConsentHistories.TestCase
TestConsentHistories.settings = settings(
    max_examples=300, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
