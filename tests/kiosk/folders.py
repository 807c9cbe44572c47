"""What lies in a training folder, and a case that was reviewed: for the tests of the consent gate."""

from pathlib import Path

from kiosk import export
from kiosk.store import CaseStore
from tests.kiosk.conftest import picture
from tests.kiosk.fakes import answer


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
