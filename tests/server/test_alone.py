"""One run at a time in a folder of rounds, whoever comes next."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from server import alone, certs, signing
from server.alone import FILE
from server.cli import main
from server.settings import SettingsRejected

HOLD = """
import sys, time
from pathlib import Path
from server.alone import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_waits_says_so_once_and_is_refused(tmp_path: Path) -> None:
    said: list[str] = []
    naps: list[float] = []
    second = alone.alone(tmp_path, wait=2, say=said.append, sleep=naps.append)
    with alone.alone(tmp_path), pytest.raises(SettingsRejected, match="Another run is at work"), second:
        pass
    assert len(said) == 1 and sum(naps) == 2
    with alone.alone(tmp_path, wait=0):
        assert (tmp_path / FILE).is_file()


def test_a_run_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout is not None and held.stdout.readline() == "held\n"
        with pytest.raises(SettingsRejected), alone.alone(tmp_path, wait=0):
            pass
        held.kill()
        held.wait()
    with alone.alone(tmp_path, wait=0):
        pass


@pytest.mark.parametrize("command", ["rounds", "rollback", "import-round"])
def test_commands_that_change_rounds_refuse_beside_a_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    certs.make(tmp_path / "certs", [])
    signing.hand_out(tmp_path / "certs")
    state = tmp_path / "state"
    (state / "flower").mkdir(parents=True)
    (state / "flower" / "config.toml").touch()  # as after `afya-server start`
    monkeypatch.setattr("server.runs.is_up", lambda _: True)
    more = {"rollback": ["--yes"], "import-round": [str(tmp_path / "reply")]}.get(command, [])
    with alone.alone(state / "rounds"):
        places = ["--certs", str(tmp_path / "certs"), "--state", str(state)]
        done = CliRunner().invoke(main, [command, *more, *places])
    assert done.exit_code == 1 and "Another run is at work" in done.output
