"""The one place that writes the case database ($AFYA_HOME/kiosk.db): cases, turns, verdicts, consents, memory log.

One SQLite file through sqlite-utils. Every public method that writes is one transaction, flushed to the disk before it
returns: what the screen calls saved survives a power cut. Threads share one connection behind a lock; other processes
wait their turn. Does not cover reading for the screens (`queries.py`), checking and backing up (`safety.py`),
encryption, users or an audit chain, and it cannot tell that a person edited a row by hand.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kiosk.records import CONSENTS, VERDICTS, NewImage, now
from kiosk.schema import PRAGMAS, migrations

if TYPE_CHECKING:
    from sqlite_utils import Database
    from sqlite_utils.migrations import Migrations

    from model.backends import Answer

BUSY_SECONDS = 10.0  # how long a write waits for another process before it gives up


class StoreError(RuntimeError):
    """The database refused; the message is one sentence for the person at the screen."""


def connect(path: Path) -> sqlite3.Connection:
    """Open the file with the settings of `schema.PRAGMAS`; creates it for its owner only. Raises StoreError."""
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        for pragma in PRAGMAS:
            connection.execute(f"pragma {pragma}")
        mode = connection.execute("pragma journal_mode").fetchone()[0]
        sync = connection.execute("pragma synchronous").fetchone()[0]
    except sqlite3.DatabaseError as error:
        connection.close()
        raise StoreError(f"{path} cannot be read as a case database ({error}); put a backup in its place.") from error
    if (mode, sync) != ("delete", 3):
        connection.close()
        raise StoreError(
            f"{path} does not keep cases safely (journal {mode}, sync {sync}); close other programs using it."
        )
    return connection


class CaseStore:
    """The case database of this clinic. Opening it creates or upgrades the tables."""

    def __init__(self, path: Path, steps: "Migrations | None" = None) -> None:
        from sqlite_utils import Database

        self.path = Path(path)
        self._lock = threading.RLock()
        self._db = Database(connect(self.path))
        steps = steps or migrations()
        unknown = {step.name for step in steps.applied(self._db)} - {step.name for step in steps._migrations}
        if unknown:
            self.close()
            raise StoreError(
                f"{self.path} was written by a newer version of Afya ({min(unknown)}); install that version."
            )
        with self._sentences("upgraded"), self._lock:
            steps.apply(self._db)

    def close(self) -> None:
        """Close the connection; the store cannot be used afterwards."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def reading(self) -> "Iterator[Database]":
        """The database for reading, with no other thread in between. Never write through it: the methods below do."""
        with self._lock, self._sentences("read"):
            yield self._db

    @contextlib.contextmanager
    def _writing(self) -> "Iterator[Database]":
        """One transaction that is on the disk when the block ends, or leaves no trace when it raises."""
        with self._lock, self._sentences("saved"):
            connection = self._db.conn
            connection.execute("begin immediate")
            try:
                yield self._db
                connection.execute("commit")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("rollback")
                raise

    @contextlib.contextmanager
    def _sentences(self, what: str) -> Iterator[None]:
        """Turn SQLite's errors into one sentence that says what did not happen and what to do."""
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            if "full" in text:
                todo = "the disk is full; free some space and try again"
            elif "locked" in text or "busy" in text:
                todo = "another program holds the database; close it and try again"
            else:
                todo = f"the database says: {text}; run `afya-kiosk verify`"
            raise StoreError(f"This was not {what}: {todo}.") from error

    def add_case(self, image: NewImage, author: str, question: str) -> tuple[int, int]:
        """Save a new case with its first question, still without an answer. Returns (case id, turn id)."""
        digest = hashlib.sha256(image.png).hexdigest()
        row = {"created_at": now(), "author": author, "format": image.format, "frame": image.frame}
        row |= {"frames": image.frames, "fields": json.dumps(dict(image.fields), sort_keys=True)}
        row |= {"image_sha256": digest, "image": image.png}
        with self._writing() as db:
            case_id = _insert(db, "cases", row)
            return case_id, self._add_turn(db, case_id, question, author)

    def add_turn(self, case_id: int, question: str, author: str) -> int:
        """Save another question about a case, still without an answer. Returns the turn id."""
        with self._writing() as db:
            return self._add_turn(db, case_id, question, author)

    def _add_turn(self, db: "Database", case_id: int, question: str, author: str) -> int:
        row = {"case_id": case_id, "question": question.strip(), "asked_at": now(), "asked_by": author}
        return _insert(db, "turns", {**row, "status": "pending"})

    def retry_turn(self, turn_id: int) -> None:
        """Make a question that was never answered wait for its answer again; one that has an answer is left alone."""
        with self._writing() as db:
            db.execute(
                "update turns set status = 'pending', problem = null where id = ? and status <> 'answered'", [turn_id]
            )

    def answer_turn(self, turn_id: int, answer: "Answer", adapter_name: str | None = None) -> bool:
        """Save the answer of a waiting question. False, and nothing changes, when it waits no longer (it timed out)."""
        speed = answer.tokens / answer.seconds if answer.seconds > 0 else None
        row = {"status": "answered", "answer": answer.text, "confidence": answer.confidence, "seconds": answer.seconds}
        row |= {"tokens": answer.tokens, "tokens_per_second": speed, "first_token_seconds": answer.first_token_seconds}
        row |= {
            "peak_bytes": answer.peak_bytes,
            "backend": answer.backend,
            "reason": answer.reason,
            "bits": answer.bits,
        }
        row |= {"device": answer.device, "model_id": answer.model_id, "base_sha256": answer.base_sha256}
        row |= {"adapter_sha256": answer.adapter_sha256, "adapter_name": adapter_name}
        row |= {"reliance": answer.reliance, "reliance_nats": answer.reliance_nats}
        with self._writing() as db:
            return _update_pending(db, turn_id, row)

    def fail_turn(self, turn_id: int, problem: str) -> bool:
        """Note in one sentence why a waiting question got no answer. False when it waits no longer."""
        with self._writing() as db:
            return _update_pending(db, turn_id, {"status": "failed", "problem": problem})

    def review(self, turn_id: int, verdict: str, author: str, correction: str | None = None) -> None:
        """Save what a person says about an answer; the latest word counts. StoreError if there is no answer yet."""
        correction = (correction or "").strip() or None
        if verdict not in VERDICTS[1:] or (verdict == "corrected") != (correction is not None):
            raise StoreError("This was not saved: write the right answer before saving a correction.")
        row = [verdict, correction, author, now(), turn_id]
        with self._writing() as db:
            changed = db.execute(
                "update turns set verdict = ?, correction = ?, reviewed_by = ?, reviewed_at = ?"
                " where id = ? and status = 'answered'",
                row,
            ).rowcount
            if not changed:
                raise StoreError("This was not saved: the question has no answer yet; ask it again first.")

    def add_consent(self, case_id: int, state: str, author: str, looked: bool = False) -> None:
        """Append a consent decision. Screens go through `export.set_consent`, which keeps the training folder true."""
        if state not in CONSENTS:
            raise StoreError(f"This was not saved: consent is one of {', '.join(CONSENTS)}.")
        with self._writing() as db:
            row = {"case_id": case_id, "state": state, "looked": int(looked), "author": author, "at": now()}
            _insert(db, "consents", row)

    def log_memory(self, event: str, rss_bytes: int, **measured: Any) -> None:
        """Append one measurement, timed to the millisecond; `measured` are other columns of `memory_log`."""
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._writing() as db:
            _insert(db, "memory_log", {"at": moment, "event": event, "rss_bytes": rss_bytes, **measured})

    def note_backup(self, path: Path, size: int) -> None:
        """Remember that a verified backup of `size` bytes was written to `path`."""
        with self._writing() as db:
            _insert(db, "backups", {"at": now(), "path": str(path), "bytes": size})


def _insert(db: "Database", table: str, row: dict[str, Any]) -> int:
    """Insert one row and return its id."""
    return int(db[table].insert(row).last_pk)


def _update_pending(db: "Database", turn_id: int, row: dict[str, Any]) -> bool:
    """Update a turn that still waits for its answer; says whether it did."""
    names = ", ".join(f"{name} = ?" for name in row)
    cursor = db.execute(f"update turns set {names} where id = ? and status = 'pending'", [*row.values(), turn_id])
    return bool(cursor.rowcount)
