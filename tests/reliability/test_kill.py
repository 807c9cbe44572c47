"""kill -9 at 20 random moments of writing: nothing acknowledged is lost, and the training folder is put right."""

import subprocess
import sys
from pathlib import Path

import pytest

from kiosk import export, queries, safety
from kiosk.store import CaseStore
from model.data import read_training

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, int]]]:
    """A home whose writers were all killed, and the promises they had made."""
    home = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-W", "error", "-m", "tests.reliability.writer", str(home), str(KILLS), "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    promises = [(line.split()[0], int(line.split()[1])) for line in done.stdout.splitlines()]
    assert sum(what == "killed" for what, _ in promises) == KILLS, done.stderr
    return home, promises


def test_nothing_acknowledged_is_lost(aftermath: tuple[Path, list[tuple[str, int]]]) -> None:
    home, promises = aftermath
    check = safety.verify(home / "kiosk.db")
    assert check.problems == ()
    store = CaseStore(home / "kiosk.db")
    cases = {case.id: case for case in queries.search(store, queries.Filter(), limit=10**6)}
    turns = {turn.id: turn for case in cases.values() for turn in case.turns}
    promised = {what: [number for kind, number in promises if kind == what] for what, _ in promises}
    assert len(promised["case"]) >= KILLS  # the writers did get somewhere
    assert [number for number in promised["case"] if number not in cases] == []
    assert [number for number in promised["answer"] if turns[number].answer != "yes"] == []
    withdrawn = set(promised.get("care", []))
    assert [number for number in withdrawn if cases[number].consent != "care"] == []
    kept = set(promised["training"]) - withdrawn
    assert [number for number in kept if "training" not in [consent.state for consent in cases[number].consents]] == []
    store.close()


def test_the_training_folder_never_held_too_much_and_is_put_right(
    aftermath: tuple[Path, list[tuple[str, int]]],
) -> None:
    home, _ = aftermath
    store = CaseStore(home / "kiosk.db")
    allowed = {f"case-{row.case_id}-turn-{row.turn_id}" for row in queries.trainable(store)}
    found = {path.stem for path in (home / "training" / "samples").glob("*.json") if not path.name.startswith(".")}
    assert found <= allowed  # before anything was repaired
    export.reconcile(store, home)
    assert {sample.id for sample in read_training(home / "training")} == allowed
    store.close()
