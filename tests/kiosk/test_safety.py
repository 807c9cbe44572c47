"""Verify finds damage and says where; a backup is a whole, checked copy or there is none."""

import os
from pathlib import Path

import pytest

from kiosk import queries, safety
from kiosk.store import CaseStore, StoreError
from tests.kiosk.conftest import picture
from tests.kiosk.fakes import answer


@pytest.fixture
def filled(store: CaseStore) -> CaseStore:
    for brightness in (40, 200):
        case_id, turn_id = store.add_case(picture(brightness), "NA", "Bright?")
        store.answer_turn(turn_id, answer())
        store.add_consent(case_id, "training", "NA")
    return store


def test_verify_is_content_with_what_the_store_wrote(filled: CaseStore) -> None:
    check = safety.verify(filled.path)
    assert (check.cases, check.turns, check.problems) == (2, 2, ())


def test_one_flipped_byte_in_a_picture_is_named(filled: CaseStore) -> None:
    png = picture(200).png
    filled.close()
    data = bytearray(filled.path.read_bytes())
    data[data.index(png[-60:-20]) + 5] ^= 1
    filled.path.write_bytes(data)
    assert safety.verify(filled.path).problems == ("case 2: the picture is not the one that was saved",)


def test_a_truncated_file_is_reported_not_raised(filled: CaseStore) -> None:
    filled.close()
    os.truncate(filled.path, filled.path.stat().st_size // 2)
    assert safety.verify(filled.path).problems


def test_verify_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no case database"):
        safety.verify(tmp_path / "kiosk.db")
    assert not list(tmp_path.glob("kiosk.db*"))


def test_a_backup_put_in_place_is_the_same_kiosk(filled: CaseStore, tmp_path: Path) -> None:
    target = tmp_path / "usb" / "afya.db"
    with pytest.raises(StoreError, match="no folder"):
        safety.backup(filled, target)
    target.parent.mkdir()
    assert safety.backup(filled, target).cases == 2
    assert [path.name for path in target.parent.iterdir()] == ["afya.db"]
    assert target.stat().st_mode & 0o777 == 0o600
    noted = queries.last_backup(filled)
    assert noted is not None and noted["bytes"] == target.stat().st_size
    restored = CaseStore(target)
    assert [queries.case(restored, number) for number in (1, 2)] == [queries.case(filled, number) for number in (1, 2)]
    assert queries.image(restored, 2) == picture(200).png
    restored.close()


def test_an_existing_backup_is_replaced_only_when_asked(filled: CaseStore, tmp_path: Path) -> None:
    target = tmp_path / "afya.db"
    target.write_bytes(b"older")
    with pytest.raises(StoreError, match="exists already"):
        safety.backup(filled, target)
    assert target.read_bytes() == b"older"
    assert safety.backup(filled, target, replace=True).cases == 2


def test_a_damaged_original_makes_no_backup(filled: CaseStore, tmp_path: Path) -> None:
    with filled.reading() as db:
        db.execute("update cases set image = zeroblob(40) where id = 1")
    with pytest.raises(StoreError, match="not kept, it is damaged"):
        safety.backup(filled, tmp_path / "afya.db")
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    assert queries.last_backup(filled) is None
