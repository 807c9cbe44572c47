"""Reading the case database for the screens: one case, its picture, search, what may be trained on, plots, counts.

Every function takes a `CaseStore` and writes nothing. Search compares case-folded text, so it finds "ÉPANCHEMENT" by
"épanchement"; it does not know synonyms or word stems.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from kiosk.records import Case, Consent, Trainable, Turn
from kiosk.store import CaseStore, StoreError

# The latest consent of each case: what counts.
_LATEST = "select case_id, state, looked, at from consents where id in (select max(id) from consents group by case_id)"


def case(store: CaseStore, case_id: int) -> Case:
    """One case with its turns and consents. Raises StoreError when there is no such case."""
    with store.reading() as db:
        rows = list(
            db.query(
                "select id, created_at, author, format, frame, frames, fields, image_sha256 from cases where id = ?",
                [case_id],
            )
        )
        if not rows:
            raise StoreError(f"There is no case {case_id} on this computer; look for it under Cases.")
        turns = [Turn.of(row) for row in db.query("select * from turns where case_id = ? order by id", [case_id])]
        consents = [
            Consent.of(row) for row in db.query("select * from consents where case_id = ? order by id", [case_id])
        ]
    return Case.of(rows[0], turns, consents)


def turn(store: CaseStore, turn_id: int) -> Turn:
    """One turn. Raises StoreError when there is no such turn."""
    with store.reading() as db:
        for row in db.query("select * from turns where id = ?", [turn_id]):
            return Turn.of(row)
    raise StoreError(f"There is no question {turn_id} on this computer.")


def image(store: CaseStore, case_id: int) -> bytes:
    """The PNG of a case, checked against its stored hash. Raises StoreError rather than show a wrong picture."""
    with store.reading() as db:
        rows = list(db.query("select image, image_sha256 from cases where id = ?", [case_id]))
    if not rows:
        raise StoreError(f"There is no case {case_id} on this computer; look for it under Cases.")
    if hashlib.sha256(rows[0]["image"]).hexdigest() != rows[0]["image_sha256"]:
        raise StoreError(
            f"The picture of case {case_id} is damaged and is not shown; ask for it to be restored from a backup."
        )
    return bytes(rows[0]["image"])


@dataclass(frozen=True)
class Filter:
    """What to look for; empty fields ask nothing. `since` and `until` are UTC moments, both included."""

    words: str = ""
    since: str = ""
    until: str = ""
    verdict: str = ""  # one of records.VERDICTS; "none" finds cases with an answer still to review


def search(store: CaseStore, wanted: Filter, limit: int = 20, offset: int = 0) -> list[Case]:
    """Cases that match, newest first. All words must occur in the case's questions, answers and corrections."""
    where, values = ["1"], []
    for word in wanted.words.casefold().split():
        where.append(
            "exists (select 1 from turns t where t.case_id = c.id and instr(fold(t.question || ' ' ||"
            " coalesce(t.answer, '') || ' ' || coalesce(t.correction, '')), ?))"
        )
        values.append(word)
    if wanted.since:
        where.append("c.created_at >= ?")
        values.append(wanted.since)
    if wanted.until:
        where.append("c.created_at <= ?")
        values.append(wanted.until)
    if wanted.verdict:
        where.append(
            "exists (select 1 from turns t where t.case_id = c.id and t.verdict = ? and t.status = 'answered')"
        )
        values.append(wanted.verdict)
    sql = f"select c.id from cases c where {' and '.join(where)} order by c.id desc limit ? offset ?"
    with store.reading() as db:
        db.register_function(_fold, name="fold", deterministic=True)
        ids = [row["id"] for row in db.query(sql, [*values, limit, offset])]
        return [case(store, case_id) for case_id in ids]


def _fold(text: str) -> str:
    return text.casefold()


def trainable(store: CaseStore, case_id: int | None = None) -> list[Trainable]:
    """Reviewed turns (confirmed or corrected) of cases whose latest consent is "training", of one case or of all."""
    sql = (
        "select t.id turn_id, t.case_id, t.question, c.image_sha256, c.format, c.fields,"
        " latest.at consented_at, latest.looked,"
        " case t.verdict when 'corrected' then t.correction else t.answer end answer"
        f" from turns t join cases c on c.id = t.case_id join ({_LATEST}) latest on latest.case_id = c.id"
        " where t.status = 'answered' and t.verdict in ('confirmed', 'corrected') and latest.state = 'training'"
        " and (? is null or c.id = ?) order by t.id"
    )
    with store.reading() as db:
        return [Trainable.of(row) for row in db.query(sql, [case_id, case_id])]


@dataclass(frozen=True)
class Counts:
    """How much there is on this computer."""

    cases: int
    questions: int
    answered: int
    confirmed: int
    corrected: int
    rejected: int
    shared: int  # cases whose latest consent is "training"


def counts(store: CaseStore) -> Counts:
    """Count cases, questions, verdicts and cases that may be trained on."""
    with store.reading() as db:
        one = next(
            iter(
                db.query(
                    "select (select count(*) from cases) cases, count(*) questions,"
                    " coalesce(sum(status = 'answered'), 0) answered,"
                    " coalesce(sum(verdict = 'confirmed'), 0) confirmed,"
                    " coalesce(sum(verdict = 'corrected'), 0) corrected,"
                    " coalesce(sum(verdict = 'rejected'), 0) rejected,"
                    f" (select count(*) from ({_LATEST}) where state = 'training') shared from turns"
                )
            )
        )
    return Counts(**one)


def memory_rows(store: CaseStore, limit: int = 500) -> list[dict[str, Any]]:
    """The latest measurements of `memory_log`, oldest first."""
    with store.reading() as db:
        return list(db.query("select * from (select * from memory_log order by id desc limit ?) order by id", [limit]))


def last_backup(store: CaseStore) -> dict[str, Any] | None:
    """When and where the latest verified backup was written (keys at, path, bytes), or None."""
    with store.reading() as db:
        return next(iter(db.query("select at, path, bytes from backups order by id desc limit 1")), None)


def store_bytes(store: CaseStore) -> int:
    """Size of the database file in bytes."""
    return store.path.stat().st_size
