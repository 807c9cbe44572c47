"""The tables of the case database, as a list of migrations, and the settings every connection to it gets.

A migration and the record that it was applied commit together (sqlite-utils' `Migrations`), so a kiosk that loses power
while upgrading finds either the old tables or the new ones. Never change a migration that was released: add one.
Does not cover reading or writing rows (`store.py`, `queries.py`).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlite_utils import Database
    from sqlite_utils.migrations import Migrations

# Measured with a simulated power cut after each of 200 commits: with these, no acknowledged commit was lost. Plain FULL
# does not flush the folder after the journal is deleted, and WAL with NORMAL lost commits in 158 of 200 cuts.
PRAGMAS = ("journal_mode=DELETE", "synchronous=EXTRA", "foreign_keys=ON", "trusted_schema=OFF")

_VERSION_1 = """
create table cases (
    id integer primary key autoincrement,
    created_at text not null,
    author text not null check (length(author) > 0),
    format text not null,
    frame integer not null,
    frames integer not null,
    fields text not null,
    image_sha256 text not null check (length(image_sha256) = 64),
    image blob not null
) strict;

create table turns (
    id integer primary key autoincrement,
    case_id integer not null references cases (id),
    question text not null check (length(question) > 0),
    asked_at text not null,
    asked_by text not null check (length(asked_by) > 0),
    status text not null check (status in ('pending', 'answered', 'failed')),
    problem text,
    answer text,
    confidence real,
    first_token_seconds real,
    tokens integer,
    seconds real,
    tokens_per_second real,
    peak_bytes integer,
    backend text,
    reason text,
    bits integer,
    device text,
    model_id text,
    base_sha256 text,
    adapter_sha256 text,
    adapter_name text,
    verdict text not null default 'none' check (verdict in ('none', 'confirmed', 'corrected', 'rejected')),
    correction text,
    reviewed_by text,
    reviewed_at text,
    check (status <> 'answered' or answer is not null),
    check (verdict = 'none' or (status = 'answered' and reviewed_by is not null and reviewed_at is not null)),
    check ((verdict = 'corrected') = (correction is not null and length(correction) > 0))
) strict;
create index turns_by_case on turns (case_id);

create table consents (
    id integer primary key autoincrement,
    case_id integer not null references cases (id),
    state text not null check (state in ('none', 'care', 'training')),
    looked integer not null check (looked in (0, 1)),
    author text not null check (length(author) > 0),
    at text not null
) strict;
create index consents_by_case on consents (case_id);
create trigger consents_are_never_changed before update on consents
    begin select raise(abort, 'consents are append-only'); end;
create trigger consents_are_never_deleted before delete on consents
    begin select raise(abort, 'consents are append-only'); end;

create table memory_log (
    id integer primary key autoincrement,
    at text not null,
    event text not null,
    turn_id integer references turns (id),
    rss_bytes integer not null,
    peak_bytes integer,
    first_token_seconds real,
    seconds real,
    tokens_per_second real,
    backend text
) strict;

create table backups (
    id integer primary key autoincrement,
    at text not null,
    path text not null,
    bytes integer not null
) strict;
"""

_VERSION_2 = """
alter table turns add column reliance text
    check (reliance is null or reliance in ('image-reliant', 'unsure', 'not image-reliant'));
alter table turns add column reliance_nats real;
"""


def migrations() -> "Migrations":
    """Every migration of the case database, oldest first."""
    from sqlite_utils.migrations import Migrations

    steps = Migrations("kiosk")

    @steps(name="0001_cases_turns_consents")
    def first(db: "Database") -> None:
        run_script(db, _VERSION_1)

    @steps(name="0002_reliance")
    def second(db: "Database") -> None:
        run_script(db, _VERSION_2)

    return steps


def run_script(db: "Database", script: str) -> None:
    """Execute several statements inside the transaction that is open (executescript() would commit it first)."""
    import sqlite3

    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""
