"""Tests of model/files.py: a write is all or nothing, hashes are the standard's, the home folder is private."""

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import files

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
