"""The power fails at more than 200 moments while cases are written: nothing acknowledged is lost, the file opens.

The statements are those the store itself issues, recorded from a real one and replayed through a simulated disk with
the store's own pragmas. The same harness must see losses with weaker settings, or it would prove nothing.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from kiosk.schema import PRAGMAS
from kiosk.store import CaseStore
from tests.kiosk.conftest import picture
from tests.kiosk.fakes import answer

apsw = pytest.importorskip("apsw", reason="the simulated disk needs apsw: pip install apsw")

from tests.reliability.powercut import CutVFS, Disk  # noqa: E402

# Everything that was acknowledged, as numbers that only grow.
COUNTS = (
    "select (select count(*) from cases where length(image) > 0), (select count(*) from turns),"
    " (select count(*) from turns where status = 'answered'), (select count(*) from turns where verdict <> 'none'),"
    " (select count(*) from consents), (select count(*) from memory_log)"
)
CASES = 14


@dataclass
class Outcome:
    """What was found after all cuts of a run."""

    cuts: int = 0
    lost: int = 0
    corrupt: int = 0


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """The tables, and every write of a store that is asked, answered, reviewed and consented, as SQLite executed it."""
    statements: list[str] = []
    store = CaseStore(tmp_path_factory.mktemp("script") / "kiosk.db")
    with store.reading() as db:
        tables = [row[0] for row in db.execute("select sql from sqlite_master where sql like 'create%'")]
        tables = [text for text in tables if "sqlite_sequence" not in text]
        db.conn.set_trace_callback(statements.append)
    for number in range(CASES):
        case_id, turn_id = store.add_case(picture(40 + number), "NA", "Is it bright?")
        store.answer_turn(turn_id, answer("yes"))
        store.review(turn_id, "corrected", "NA", "no")
        store.add_consent(case_id, "training", "NA")
        store.log_memory("answer", 1, turn_id=turn_id)
    store.close()
    kept = ("begin", "commit", "insert", "update", "savepoint", "release")
    writes = [text for text in statements if text.split()[0].lower() in kept]
    assert writes.count("commit") == 5 * CASES and sum("x'89504e47" in text for text in writes) == CASES
    return tables, writes


def cut_often(script: tuple[list[str], list[str]], pragmas: tuple[str, ...], seed: int, folder: Path) -> Outcome:
    """Replay the script; cut after every commit and before one in six steps on the disk; count what is missing."""
    tables, writes = script
    outcome, disk = Outcome(), Disk(seed)
    vfs = CutVFS(f"cut-{folder.name}", disk)
    db = apsw.Connection(str(folder / "kiosk.db"), vfs=f"cut-{folder.name}")
    for pragma in pragmas:
        db.execute(f"pragma {pragma}")
    db.execute("begin; " + "; ".join(tables) + "; commit")
    acknowledged = db.execute(COUNTS).fetchone()

    def perhaps() -> None:
        if disk.random.random() < 1 / 6:
            inspect(disk, acknowledged, outcome)

    disk.before_step = perhaps
    for text in writes:
        db.execute(text)
        if text == "commit":
            acknowledged = db.execute(COUNTS).fetchone()
            inspect(disk, acknowledged, outcome)
    disk.before_step = lambda: None
    db.close()
    vfs.unregister()
    return outcome


def inspect(disk: Disk, acknowledged: tuple[int, ...], outcome: Outcome) -> None:
    """Open with plain SQLite what a cut would leave now, and count what is missing of the acknowledged rows."""
    outcome.cuts += 1
    with tempfile.TemporaryDirectory() as left:
        disk.after_cut(Path(left))
        db = apsw.Connection(str(Path(left) / "kiosk.db"))
        try:
            outcome.corrupt += db.pragma("integrity_check") != "ok"
            found = db.execute(COUNTS).fetchone()
            outcome.lost += any(have < promised for have, promised in zip(found, acknowledged, strict=True))
        except apsw.SQLError:  # not even the tables are there
            outcome.lost += 1
        except apsw.Error:
            outcome.corrupt += 1
        finally:
            db.close()


def test_the_stores_settings_lose_nothing(script: tuple[list[str], list[str]], tmp_path: Path) -> None:
    outcome = cut_often(script, PRAGMAS, seed=1, folder=tmp_path)
    assert outcome.cuts >= 200
    assert (outcome.lost, outcome.corrupt) == (0, 0), f"of {outcome.cuts} cuts"


@pytest.mark.parametrize(
    "weaker", [("journal_mode=DELETE", "synchronous=FULL"), ("journal_mode=WAL", "synchronous=NORMAL")]
)
def test_the_harness_sees_what_weaker_settings_lose(
    script: tuple[list[str], list[str]], tmp_path: Path, weaker: tuple[str, ...]
) -> None:
    assert cut_often(script, weaker, seed=1, folder=tmp_path).lost > 20
