"""The kiosk's own copies on the disk: power cuts, no room, several kiosks, whose the folder is, what is kept."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model import adapters, installed, verified
from model.adapters import AdapterRejected
from tests.model.signed import point, pointer, release, taken, trust


def test_old_copies_go_but_never_the_one_in_use(tmp_path: Path, afya_home: Path) -> None:
    trust(afya_home)
    using, names = None, []
    for serial in range(1, 8):
        names.append(release(afya_home, tmp_path, serial).name)
        found = verified.take(afya_home, using)
        assert found is not None
        using = using or found.folder
    assert using is not None
    kept = sorted(path.name for path in (afya_home / verified.FOLDER).glob("round-*"))
    assert kept == sorted([using.name, *names[-verified.KEPT :]])


CUT = """
import os, sys; from pathlib import Path; from model import verified
left = int(sys.argv[2])
def counted(real):
    def call(*arguments, **options):
        global left
        left -= 1
        return os._exit(9) if left < 0 else real(*arguments, **options)
    return call
for name in ("fsync", "rename", "replace", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
verified.take(Path(sys.argv[1]))
"""


def test_what_a_power_cut_or_a_bad_disk_leaves_is_replaced(tmp_path: Path, afya_home: Path) -> None:
    trust(afya_home)
    place = release(afya_home, tmp_path, 1)
    whole = sorted([verified.NEWEST.name, place.name])
    ends = 0
    while subprocess.run([sys.executable, "-c", CUT, str(afya_home), str(ends)], check=False).returncode == 9:
        ends += 1
        copy = taken(afya_home)
        assert adapters.sha256(copy) == adapters.sha256(place)
        assert [name for name in sorted(os.listdir(copy.parent)) if not name.startswith(".newest")] == whole
        (copy / adapters.WEIGHTS).write_bytes(b"half")
        (afya_home / verified.NEWEST).unlink()
    assert ends >= 8


def test_a_disk_that_takes_nothing_is_told_and_a_copy_on_it_is_still_used(
    tmp_path: Path, afya_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(afya_home)
    release(afya_home, tmp_path, 1)
    copy = taken(afya_home)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    text = pointer(afya_home)
    new = release(afya_home, tmp_path, 2)
    with monkeypatch.context() as disk:
        for name in ("fsync", "utime"):
            disk.setattr(os, name, full)
        with pytest.raises(AdapterRejected, match=r"verified cannot be written \(No space left on device\)"):
            verified.take(afya_home, copy)
        assert sorted(os.listdir(afya_home / verified.FOLDER)) == sorted([verified.NEWEST.name, copy.name])
        point(afya_home, new, text)
        assert taken(afya_home) == copy
        with pytest.raises(OSError, match="No space left"):
            installed.rollback(afya_home, new.name)
    assert pointer(afya_home) == text


def test_two_kiosks_of_one_home_take_turns(tmp_path: Path, afya_home: Path) -> None:
    """While one is at work the others wait; then they find its copy or make their own, and all are whole."""
    trust(afya_home)
    place = release(afya_home, tmp_path, 1)
    (afya_home / verified.FOLDER).mkdir()
    program = "import sys; from pathlib import Path; from model import verified; verified.take(Path(sys.argv[1]))"
    descriptor = os.open(afya_home / verified.FOLDER, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    three = [subprocess.Popen([sys.executable, "-c", program, str(afya_home)]) for _ in range(3)]
    time.sleep(2)
    assert [process.poll() for process in three] == [None] * 3 and os.listdir(afya_home / verified.FOLDER) == []
    os.close(descriptor)
    assert [process.wait(60) for process in three] == [0] * 3
    assert adapters.sha256(taken(afya_home)) == adapters.sha256(place)
    assert sorted(os.listdir(afya_home / verified.FOLDER)) == sorted([verified.NEWEST.name, place.name])


def test_root_leaves_the_folder_to_the_owner_of_the_home(tmp_path: Path, afya_home: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can work in another user's home")
    trust(afya_home)
    release(afya_home, tmp_path, 1)
    release(afya_home, tmp_path, 2)
    os.chown(afya_home, 1, 1)
    assert installed.rollback(afya_home)
    for path in (afya_home / verified.FOLDER, afya_home / verified.ALLOWED):
        assert (path.stat().st_uid, path.stat().st_gid) == (1, 1)
