"""Any order of questions, verdicts, consents and power cuts: the training folder holds what was decided, no more."""

import atexit
import functools
import os
import shutil
import tempfile
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
from tests.kiosk.folders import image_names, names, reviewed

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
    max_examples=200, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
