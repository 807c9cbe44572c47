"""The kiosk's own copies: nothing that a hostile client does in adapters/ reaches them; only a person goes back."""

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model import adapters, installed, passport, verified
from model.adapters import AdapterRejected
from tests.model.signed import KEY, OTHER, TRAPS, adapter, at_once, point, pointer, put, release, signed, taken, trust


def test_the_copy_is_whole_and_for_the_owner_only_and_is_used_again(tmp_path: Path, afya_home: Path) -> None:
    assert verified.take(afya_home) is None and not (afya_home / verified.FOLDER).exists()
    trust(afya_home)
    place = release(afya_home, tmp_path, 1)
    copy = taken(afya_home)
    assert copy == afya_home / verified.FOLDER / place.name and adapters.sha256(copy) == adapters.sha256(place)
    for path, mode in ((copy.parent, 0o700), (copy, 0o700), (afya_home / verified.NEWEST, 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    (place / adapters.WEIGHTS).write_bytes(b"exchanged")
    inode = (copy / adapters.WEIGHTS).stat().st_ino
    assert taken(afya_home) == copy and (copy / adapters.WEIGHTS).stat().st_ino == inode
    (afya_home / "adapters" / installed.POINTER).unlink()
    assert verified.take(afya_home) is None


@pytest.mark.parametrize("file", [adapters.CONFIG, adapters.WEIGHTS, passport.FILE])
@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused_at_once_and_nothing_is_kept_of_it(
    tmp_path: Path, afya_home: Path, trap: Callable[[Path], None], file: str
) -> None:
    trust(afya_home)
    trap(release(afya_home, tmp_path, 1) / file)
    with pytest.raises(AdapterRejected) as caught:
        at_once(lambda: verified.take(afya_home))
    assert str(caught.value).count("\n") == 0 and str(caught.value).endswith(".")
    assert not (afya_home / verified.FOLDER).exists() or os.listdir(afya_home / verified.FOLDER) == []


def test_what_is_exchanged_while_it_is_copied_is_refused(
    tmp_path: Path, afya_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signed files are there when the passport is verified, and others when they are read."""
    trust(afya_home)
    place = release(afya_home, tmp_path, 1)
    forged, real = adapter(tmp_path / "forged", 9.0), adapters.pieces

    def exchanging(folder: Path, name: str) -> Iterator[bytes]:
        if folder == place and name == adapters.WEIGHTS:
            shutil.copy(forged / name, place / name)
        return real(folder, name)

    monkeypatch.setattr(adapters, "pieces", exchanging)
    with pytest.raises(AdapterRejected, match="not what was installed"):
        verified.take(afya_home)
    assert os.listdir(afya_home / verified.FOLDER) == []


def test_an_older_release_is_refused_even_when_every_trace_of_the_newer_one_is_gone(
    tmp_path: Path, afya_home: Path
) -> None:
    trust(afya_home)
    old = release(afya_home, tmp_path, 5)
    text = pointer(afya_home)
    taken(afya_home)
    new = release(afya_home, tmp_path, 7)
    copy = taken(afya_home)
    shutil.rmtree(new)
    point(afya_home, old, text)
    for _ in range(2):
        with pytest.raises(AdapterRejected, match=f"number 5 and this kiosk has seen number 7 .{new.name}") as caught:
            verified.take(afya_home, copy)
    assert f"`afya-kiosk adapter rollback --to {old.name}`" in str(caught.value)
    assert copy.is_dir()


def test_a_person_may_go_back_to_one_older_release_until_a_newer_one_comes(tmp_path: Path, afya_home: Path) -> None:
    trust(afya_home)
    places, texts = {}, {}
    for serial in (3, 5, 7):
        places[serial] = release(afya_home, tmp_path, serial)
        texts[serial] = pointer(afya_home)
        taken(afya_home)
    assert installed.rollback(afya_home) == places[5].name
    assert taken(afya_home).name == places[5].name == taken(afya_home).name
    point(afya_home, places[3], texts[3])  # a still older one, which nobody here went back to
    with pytest.raises(AdapterRejected, match="number 3"):
        verified.take(afya_home)
    point(afya_home, places[7], texts[7])
    assert taken(afya_home).name == places[7].name
    places[8] = release(afya_home, tmp_path, 8)
    assert taken(afya_home).name == places[8].name
    point(afya_home, places[5], texts[5])
    with pytest.raises(AdapterRejected, match="number 5"):
        verified.take(afya_home)
    assert installed.rollback(afya_home, places[5].name) == places[5].name
    assert taken(afya_home).name == places[5].name
    assert installed.rollback(afya_home) is None and verified.take(afya_home) is None
    point(afya_home, places[5], texts[5])
    with pytest.raises(AdapterRejected, match="number 5"):
        verified.take(afya_home)


def test_going_back_before_the_kiosk_looked_is_seen_by_it(tmp_path: Path, afya_home: Path) -> None:
    """Nobody asked anything between the release, the newer release and the way back."""
    trust(afya_home)
    old, middle = release(afya_home, tmp_path, 5), release(afya_home, tmp_path, 6)
    taken(afya_home)
    release(afya_home, tmp_path, 7)
    assert installed.rollback(afya_home) == middle.name and taken(afya_home).name == middle.name
    assert installed.rollback(afya_home, old.name) == old.name and taken(afya_home).name == old.name


def test_the_coordinators_way_back_is_a_new_number_for_the_same_adapter(tmp_path: Path, afya_home: Path) -> None:
    trust(afya_home)
    first = release(afya_home, tmp_path, 5)
    text = pointer(afya_home)
    old_passport = (first / passport.FILE).read_text()
    taken(afya_home)
    second = release(afya_home, tmp_path, 7)
    taken(afya_home)
    put(afya_home, tmp_path / "a5", signed(tmp_path / "a5", serial=8))
    assert taken(afya_home).name == first.name
    assert json.loads((afya_home / verified.NEWEST).read_text())[passport.name_of(KEY.public_key())] == {
        "serial": 8,
        "name": first.name,
    }
    put(afya_home, tmp_path / "a7", signed(tmp_path / "a7", serial=7))
    with pytest.raises(AdapterRejected, match=f"number 7 and this kiosk has seen number 8 .{first.name}"):
        verified.take(afya_home)
    (first / passport.FILE).write_text(old_passport)
    point(afya_home, first, text)
    with pytest.raises(AdapterRejected, match="number 5"):
        verified.take(afya_home)
    assert second.is_dir()


def test_with_the_pointer_gone_nothing_answers_whatever_else_is_damaged(tmp_path: Path, afya_home: Path) -> None:
    trust(afya_home)
    release(afya_home, tmp_path, 7)
    taken(afya_home)
    for path in (afya_home / verified.NEWEST, afya_home / "federation" / passport.PUBLIC):
        path.write_text("{")
    (afya_home / "adapters" / installed.POINTER).unlink()
    assert verified.take(afya_home) is None


def test_numbers_count_for_each_key_and_a_lost_file_begins_again(tmp_path: Path, afya_home: Path) -> None:
    trust(afya_home)
    release(afya_home, tmp_path, 7)
    taken(afya_home)
    trust(afya_home, OTHER)
    release(afya_home, tmp_path, 2, OTHER)
    taken(afya_home)
    trust(afya_home)
    low = release(afya_home, tmp_path, 4)
    with pytest.raises(AdapterRejected, match="number 7"):
        verified.take(afya_home)
    (afya_home / verified.NEWEST).write_text("{")
    with pytest.raises(AdapterRejected, match=r"newest.json is damaged .*; remove it to begin"):
        verified.take(afya_home)
    with pytest.raises(AdapterRejected, match="is damaged"):
        installed.rollback(afya_home, low.name)
    (afya_home / verified.NEWEST).unlink()
    assert taken(afya_home).name == low.name


def test_the_key_decides_about_unsigned_adapters_not_what_was_seen_before(tmp_path: Path, afya_home: Path) -> None:
    bare = put(afya_home, adapter(tmp_path / "bare"), None)
    found = verified.take(afya_home)
    assert found is not None and found.folder.name == bare.name and found.unsigned == passport.UNSIGNED
    assert not (afya_home / verified.NEWEST).exists()
    trust(afya_home)
    release(afya_home, tmp_path, 5)
    taken(afya_home)
    put(afya_home, tmp_path / "bare", None)
    with pytest.raises(AdapterRejected, match="no readable passport"):
        verified.take(afya_home)
    (afya_home / "federation" / passport.PUBLIC).unlink()
    found = verified.take(afya_home)
    assert found is not None and found.unsigned == passport.UNSIGNED


def test_a_passport_without_a_number_is_refused(tmp_path: Path, afya_home: Path) -> None:
    trust(afya_home)
    folder = adapter(tmp_path / "a")
    for serial in (None, "5", True, 0, 1.5):
        put(afya_home, folder, signed(folder, serial=serial))
        with pytest.raises(AdapterRejected, match="has no number"):
            verified.take(afya_home)
