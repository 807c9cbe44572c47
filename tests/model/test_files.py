"""Tests of model/files.py: a write is all or nothing, hashes are the standard's, the home folder is private."""

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import files
from tests.model.signed import TRAPS, at_once

SLOW_DISK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW_DISK
@given(data=st.binary(max_size=4096))
def test_what_is_written_is_read_back_and_its_hash_is_the_standard_one(tmp_path: Path, data: bytes) -> None:
    target = tmp_path / "x.bin"
    files.write_atomic(target, data)
    assert target.read_bytes() == data
    assert files.sha256_file(target) == hashlib.sha256(data).hexdigest()
    assert sorted(os.listdir(tmp_path)) == ["afya-home", "x.bin"]


def test_hash_of_a_known_vector(tmp_path: Path) -> None:
    # FIPS 180-2, appendix B.1
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_file(tmp_path / "abc") == expected


def test_a_refused_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "inside").write_text("old")
    with pytest.raises(OSError, match="directory"):
        files.write_atomic(target, b"new")  # a file cannot replace a folder that is not empty
    assert (target / "inside").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["afya-home", "folder"]


def test_a_missing_folder_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_atomic(tmp_path / "absent" / "x", b"")
    assert not (tmp_path / "absent").exists()


def test_a_new_file_is_private_and_an_old_one_keeps_its_permissions(tmp_path: Path) -> None:
    target = tmp_path / "x"
    files.write_atomic(target, b"1")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    target.chmod(0o644)
    files.write_atomic(target, b"2")
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_a_process_killed_while_writing_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "x"
    files.write_atomic(target, b"old")
    program = (
        "import os, sys; from pathlib import Path; from model import files;"
        "os.fsync = lambda fd: os._exit(9);"  # the end comes after the bytes, before the rename
        "files.write_atomic(Path(sys.argv[1]), b'new' * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert done.returncode == 9
    assert target.read_bytes() == b"old"


def test_home_follows_the_variable_and_is_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFYA_HOME", str(tmp_path / "new" / "home"))
    assert files.home() == tmp_path / "new" / "home"
    assert stat.S_IMODE(files.home().stat().st_mode) == 0o700


@SLOW_DISK
@given(data=st.binary(max_size=4096), spare=st.integers(0, 9))
def test_a_strangers_plain_file_is_read_whole(tmp_path: Path, data: bytes, spare: int) -> None:
    (tmp_path / "x").write_bytes(data)
    assert files.read_plain(tmp_path / "x", len(data) + spare) == data
    if data:
        with pytest.raises(OSError, match=f"^x is larger than {len(data) - 1} bytes$"):
            files.read_plain(tmp_path / "x", len(data) - 1)


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_of_a_stranger_is_refused_at_once(tmp_path: Path, trap: Callable[[Path], None]) -> None:
    trap(tmp_path / "x")
    with pytest.raises(OSError, match=r"^x is"):
        at_once(lambda: files.read_plain(tmp_path / "x", 1 << 30))


def test_no_link_is_followed_and_an_absent_file_is_absent(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "x").symlink_to(tmp_path / "real" / "x")
    for path in (tmp_path / "link" / "x", tmp_path / "x"):
        with pytest.raises(OSError, match="is a link"):
            files.read_plain(path, 99)
    for path in (tmp_path / "real" / "y", tmp_path / "nowhere" / "x"):
        with pytest.raises(FileNotFoundError):
            files.read_plain(path, 99)


def test_a_file_that_grows_while_it_is_read_ends_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a" * 10)
    reading = files.plain_pieces(tmp_path / "x", 10)
    assert next(reading) == b"a" * 10
    with open(tmp_path / "x", "ab") as more:
        more.write(b"b")
    with pytest.raises(OSError, match="larger than"):
        next(reading)
