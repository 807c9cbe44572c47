"""Fill a clinic's kiosk with cases as its staff would have made them: asked, answered, reviewed, consented.

The answers are the reference model's own; a wrong one is corrected with the known truth, a right one confirmed. What
may be trained on is then exported by the kiosk's own consent gate. Not here: the screens, and a person's judgement.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client import sealed
from kiosk import export
from kiosk.records import NewImage
from kiosk.store import CaseStore
from model import data, images, metrics
from model.backends import Answer
from model.data import Sample
from scripts.demo_parts.plan import Plan

AUTHOR = "demo staff"


@dataclass(frozen=True)
class Filled:
    """What a clinic's kiosk holds: `samples` is what the consent gate let into the training folder."""

    cases: int
    asked: int
    corrected: int
    samples: int


def open_home(home: Path, clinic: str, plan: Plan) -> None:
    """Make a clinic's home with its settings: the model at `plan.bits`, its name on the screen, one thread.

    Its key is made from its name and `plan.seal_seed`, so that two demos seal the same pictures.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    sealed.begin(home, hashlib.sha256(f"{plan.seal_seed} {clinic}".encode()).digest())
    settings = {"clinic": clinic, "model": str(plan.base), "bits": plan.bits}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    (home / "afya.toml").write_text("\n".join([*lines, "[client]", "threads = 1", ""]), encoding="utf-8")


def fill(home: Path, samples: Sequence[Sample], answers: Mapping[str, Answer]) -> Filled:
    """Save every question with its answer (by sample id), review, consent, and export. Raises StoreError."""
    store = CaseStore(home / "kiosk.db")
    by_image: dict[str, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(sample.group, []).append(sample)
    corrected = 0
    try:
        for rows in by_image.values():
            corrected += _case(store, rows, answers)
        changes = export.reconcile(store, home)
    finally:
        store.close()
    return Filled(len(by_image), len(samples), corrected, changes.samples)


def _case(store: CaseStore, rows: Sequence[Sample], answers: Mapping[str, Answer]) -> int:
    """One picture with its questions; returns how many answers had to be corrected."""
    picture = NewImage(images.to_png(data.load_rgb(rows[0])), "PNG", 0, 1, {})
    case_id, corrected = 0, 0
    for row in rows:
        if case_id:
            turn_id = store.add_turn(case_id, row.question, AUTHOR)
        else:
            case_id, turn_id = store.add_case(picture, AUTHOR, row.question)
        answer = answers[row.id]
        store.answer_turn(turn_id, answer)
        right = metrics.exact(answer.text, row.answer)
        store.review(turn_id, "confirmed" if right else "corrected", AUTHOR, None if right else row.answer)
        corrected += not right
    store.add_consent(case_id, "training", AUTHOR, looked=True)
    return corrected
