"""Checking the case database and copying it: `afya-kiosk verify` and `afya-kiosk backup`.

Both read everything: SQLite's own integrity check, the references between tables, and every picture against its hash.
A backup is written under a temporary name, opened and checked like the original, and only then gets its name. Does not
cover restoring: with the kiosk stopped, copy a backup to $AFYA_HOME/kiosk.db and run `afya-kiosk verify`.
"""

import contextlib
import hashlib
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from kiosk.store import CaseStore, StoreError


@dataclass(frozen=True)
class Check:
    """What a check of one database file found; `problems` is empty when all is well."""

    path: Path
    cases: int
    turns: int
    problems: tuple[str, ...]


def verify(path: Path) -> Check:
    """Read the whole file and report every damage found. Changes nothing; raises StoreError when it is not there."""
    if not path.is_file():
        raise StoreError(
            f"There is no case database at {path}; is AFYA_HOME right? A new clinic runs `afya-kiosk init` first."
        )
    problems: list[str] = []
    cases = turns = 0
    # Not read-only: a journal left by a power cut has to be rolled back before the file may be judged.
    connection = sqlite3.connect(path, timeout=10)
    try:
        # TEXT that is no longer UTF-8 is reported as damage, not raised half-way.
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        problems += [f"structure: {row[0]}" for row in connection.execute("pragma integrity_check") if row[0] != "ok"]
        problems += [
            f"reference: table {row[0]}, row {row[1]}" for row in connection.execute("pragma foreign_key_check")
        ]
        for case_id, image, digest in connection.execute("select id, image, image_sha256 from cases"):
            cases += 1
            if hashlib.sha256(image).hexdigest() != digest:
                problems.append(f"case {case_id}: the picture is not the one that was saved")
        turns = connection.execute("select count(*) from turns").fetchone()[0]
    except sqlite3.DatabaseError as error:
        problems.append(f"structure: {error}")
    finally:
        connection.close()
    return Check(path, cases, turns, tuple(problems))


def backup(store: CaseStore, target: Path, replace: bool = False) -> Check:
    """Copy the database to `target` while the kiosk runs, check the copy, then give it its name. Raises StoreError."""
    target = target.expanduser().absolute()
    if target.exists() and not replace:
        raise StoreError(f"{target} exists already; choose another name, or add --yes to replace it.")
    if not target.parent.is_dir():
        raise StoreError(f"There is no folder {target.parent}; create it or choose another.")
    from model.files import sync_folder

    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with store.reading() as db:
            db.execute("vacuum into ?", [str(partial)])
        with open(partial, "rb+") as copy:
            os.fsync(copy.fileno())
        check = verify(partial)
        if check.problems:
            raise StoreError(f"The backup was not kept, it is damaged ({check.problems[0]}); try another disk.")
        os.replace(partial, target)
        sync_folder(target.parent)
    except OSError as error:
        raise StoreError(
            f"The backup could not be written to {target} ({error.strerror}); try another disk."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    store.note_backup(target, target.stat().st_size)
    return Check(target, check.cases, check.turns, ())
