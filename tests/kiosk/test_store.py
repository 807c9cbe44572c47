"""The case database: what is saved, what a failure leaves behind, migrations, and what search finds."""

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils.migrations import Migrations

from kiosk import queries, schema
from kiosk.queries import Filter
from kiosk.store import CaseStore, StoreError, connect
from tests.kiosk.conftest import picture
from tests.kiosk.fakes import answer


def test_the_file_is_as_safe_as_promised(store: CaseStore) -> None:
    with store.reading() as db:
        assert db.execute("pragma journal_mode").fetchone()[0] == "delete"
        assert db.execute("pragma synchronous").fetchone()[0] == 3
        assert db.execute("pragma foreign_keys").fetchone()[0] == 1
    assert store.path.stat().st_mode & 0o777 == 0o600


def test_a_case_is_on_the_disk_before_it_has_an_answer(store: CaseStore) -> None:
    case_id, turn_id = store.add_case(picture(Modality="CT"), "NA", "What is shown?")
    other = CaseStore(store.path)  # as the kiosk would find it after a crash
    case = queries.case(other, case_id)
    assert (case.author, case.fields, case.consent) == ("NA", {"Modality": "CT"}, "none")
    assert (case.turns[0].id, case.turns[0].status, case.turns[0].question) == (turn_id, "pending", "What is shown?")
    assert queries.image(other, case_id) == picture().png
    other.close()


def test_an_answer_is_saved_once_and_a_late_one_not_at_all(store: CaseStore) -> None:
    case_id, turn_id = store.add_case(picture(), "NA", "Bright?")
    assert store.answer_turn(turn_id, answer("yes"), "round-1")
    assert not store.answer_turn(turn_id, answer("no"))
    assert not store.fail_turn(turn_id, "too slow")
    saved = queries.turn(store, turn_id)
    assert (saved.answer, saved.adapter_name, saved.bits, saved.tokens_per_second) == ("yes", "round-1", 4, 6.0)
    second = store.add_turn(case_id, "And now?", "NA")
    assert store.fail_turn(second, "too slow") and not store.answer_turn(second, answer())
    store.retry_turn(second)
    assert store.answer_turn(second, answer("again"))
    store.retry_turn(second)
    assert queries.turn(store, second).answer == "again"


def test_a_refused_write_leaves_nothing_behind(store: CaseStore) -> None:
    with pytest.raises(StoreError, match="This was not saved"):
        store.add_case(picture(), "NA", "   ")  # the case row is fine, its question is not
    assert queries.counts(store).cases == 0
    with pytest.raises(StoreError):
        store.add_turn(99, "Whose case?", "NA")
    store.add_case(picture(), "NA", "Still working?")
    assert queries.counts(store).cases == 1


def test_a_full_disk_is_one_sentence_and_earlier_cases_stay(store: CaseStore) -> None:
    store.add_case(picture(), "NA", "Before")
    with store.reading() as db:
        pages = db.execute("pragma page_count").fetchone()[0]
        db.execute(f"pragma max_page_count = {pages}")
    big = picture()
    object.__setattr__(big, "png", bytes(100_000))
    with pytest.raises(StoreError, match="the disk is full"):
        store.add_case(big, "NA", "During")
    with store.reading() as db:
        db.execute("pragma max_page_count = 1000000")
    case_id, _ = store.add_case(big, "NA", "After")
    assert [case.turns[0].question for case in queries.search(store, Filter())] == ["After", "Before"]
    assert queries.image(store, case_id) == bytes(100_000)


def test_reviews_need_an_answer_and_a_correction_needs_words(store: CaseStore) -> None:
    _, turn_id = store.add_case(picture(), "NA", "Bright?")
    with pytest.raises(StoreError, match="no answer yet"):
        store.review(turn_id, "confirmed", "NA")
    store.answer_turn(turn_id, answer())
    with pytest.raises(StoreError, match="write the right answer"):
        store.review(turn_id, "corrected", "NA", "  ")
    store.review(turn_id, "corrected", "BO", " dark ")
    assert queries.turn(store, turn_id).final_answer == "dark"
    store.review(turn_id, "confirmed", "BO")
    assert queries.turn(store, turn_id).correction is None


def test_consents_are_append_only(store: CaseStore) -> None:
    case_id, _ = store.add_case(picture(), "NA", "Bright?")
    for state in ("training", "care", "training"):
        store.add_consent(case_id, state, "NA")
    assert [consent.state for consent in queries.case(store, case_id).consents] == ["training", "care", "training"]
    with pytest.raises(StoreError), store.reading() as db:
        db.execute("delete from consents")
    with pytest.raises(StoreError):
        store.add_consent(case_id, "perhaps", "NA")
    assert queries.case(store, case_id).consent == "training" and len(queries.case(store, case_id).consents) == 3


def test_a_failed_migration_leaves_the_old_tables_and_no_record(store: CaseStore) -> None:
    store.add_case(picture(), "NA", "Before the upgrade")
    steps = schema.migrations()

    @steps(name="9999_broken")
    def broken(db: Any) -> None:
        schema.run_script(db, "create table extra (id integer); insert into nowhere values (1);")

    with pytest.raises(StoreError, match="not upgraded"):
        CaseStore(store.path, steps)
    with store.reading() as db:
        assert "extra" not in db.table_names()
    again = CaseStore(store.path)
    assert queries.counts(again).cases == 1
    again.close()


def test_a_migration_commits_with_its_record_and_an_older_program_refuses(store: CaseStore) -> None:
    store.add_case(picture(), "NA", "Before the upgrade")
    steps = schema.migrations()

    @steps(name="9999_extra")
    def extra(db: Any) -> None:
        schema.run_script(db, "create table extra (id integer) strict;")

    newer = CaseStore(store.path, steps)
    assert queries.counts(newer).cases == 1
    newer.close()
    with pytest.raises(StoreError, match="newer version of Afya"):
        CaseStore(store.path)


def test_a_database_of_the_first_version_is_upgraded_and_keeps_its_answers(afya_home: Path) -> None:
    old = Migrations("kiosk")

    @old(name="0001_cases_turns_consents")
    def first(db: Any) -> None:
        schema.run_script(db, schema._VERSION_1)

    path = afya_home / "old.db"
    CaseStore(path, old).close()
    with sqlite3.connect(path) as db:
        db.execute("insert into cases values (1, 'now', 'NA', 'PNG', 0, 1, '{}', ?, x'00')", ["a" * 64])
        db.execute(
            "insert into turns (case_id, question, asked_at, asked_by, status, answer)"
            " values (1, 'Old?', 'now', 'NA', 'answered', 'yes')"
        )
    db.close()
    upgraded = CaseStore(path)
    turn = queries.turn(upgraded, 1)
    assert (turn.question, turn.answer, turn.reliance, turn.reliance_nats) == ("Old?", "yes", None, None)
    _, fresh = upgraded.add_case(picture(), "NA", "New?")
    upgraded.answer_turn(fresh, replace(answer(), reliance="unsure", reliance_nats=0.3))
    turn = queries.turn(upgraded, fresh)
    assert (turn.reliance, turn.reliance_nats) == ("unsure", 0.3)
    upgraded.close()


def test_a_file_that_is_no_database_is_refused_and_kept(afya_home: Path) -> None:
    path = afya_home / "kiosk.db"
    path.write_bytes(b"not a database, but perhaps somebody's work" * 99)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="cannot be read as a case database"):
        connect(path)
    assert path.read_bytes() == before


def test_a_damaged_picture_is_never_shown(store: CaseStore) -> None:
    case_id, _ = store.add_case(picture(), "NA", "Bright?")
    other = sqlite3.connect(store.path)
    other.execute("update cases set image = zeroblob(40)")
    other.commit()
    other.close()
    with pytest.raises(StoreError, match="damaged and is not shown"):
        queries.image(store, case_id)


def test_search_by_words_date_and_check(store: CaseStore) -> None:
    ids = []
    for question, text in (("Is the LUNG clear?", "no"), ("Épanchement 50%?", "oui"), ("Which organ?", "heart")):
        case_id, turn_id = store.add_case(picture(), "NA", question)
        store.answer_turn(turn_id, answer(text))
        ids.append(case_id)
    store.review(queries.case(store, ids[2]).turns[0].id, "corrected", "NA", "Left lung")

    def found(**wanted: str) -> list[int]:
        return [case.id for case in queries.search(store, Filter(**wanted))]

    assert found() == ids[::-1]
    assert found(words="lung") == [ids[2], ids[0]]  # newest first, also in corrections
    assert found(words="clear LUNG no") == [ids[0]]
    assert found(words="épanchement") == [ids[1]] and found(words="ÉPANCHEMENT 50%") == [ids[1]]
    assert found(words="100%") == [] and found(words="_") == [] and found(words="' or 1=1 --") == []
    assert found(verdict="corrected") == [ids[2]] and found(verdict="none") == [ids[1], ids[0]]
    day = queries.case(store, ids[0]).created_at
    assert found(since=day, until="2999-01-01T00:00:00Z") == ids[::-1] and found(until="2000-01-01T00:00:00Z") == []
    assert [case.id for case in queries.search(store, Filter(), limit=1, offset=1)] == [ids[1]]


def test_threads_share_a_store(store: CaseStore) -> None:
    problems: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                _, turn_id = store.add_case(picture(), "NA", "Bright?")
                store.answer_turn(turn_id, answer())
                queries.search(store, Filter("bright"))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and queries.counts(store).answered == 20
