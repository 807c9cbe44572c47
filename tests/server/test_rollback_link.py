"""Release and rollback over the real link: signed passports in every home, and the way back with one command."""

import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from model import adapters, passport, phantoms
from scripts.federation import Local, program
from server import certs
from server.cli import main
from tests.client.clinic import fill

SECONDS = 60.0  # on a busy test machine; on two cores with two clinics it took 6.1 and 9.1 (NOTES.md)


@pytest.mark.slow
def test_a_release_is_signed_and_taken_back_over_the_link(tmp_path: Path, tiny: Path) -> None:
    names = ("north", "south")
    homes = {n: fill(tmp_path / n, phantoms.make(3, ["plain"], seed=k, size=48), tiny) for k, n in enumerate(names)}
    with Local(homes, tmp_path / "out", tiny) as local:
        config = {"num-server-rounds": 2, "rank": 2, "local-steps": 8, "batch-size": 8, "release-every": 1}
        config["gate"] = "off"  # examined over the link in tests/server/test_deployment.py
        events = local.rounds(config)
        second = _installed(homes)
        command = program("server", "rollback", "--yes", *local.places())
        done = subprocess.run(command, env=local.environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    first = _installed(homes)
    assert [event["round"] for event in events if event["event"] == "release"] == [1, 2]
    assert all(name.startswith("round-0002") for name in second)
    assert all(name.startswith("round-0001") for name in first)
    took = re.search(r"Done in ([\d.]+) s", done.stdout)
    print(done.stdout)
    assert took and float(took[1]) < SECONDS


def _installed(homes: dict[str, Path]) -> list[str]:
    """The adapter in use in each home; each one's passport is valid under the key that came with the bundle."""
    found = []
    for home in homes.values():
        folder = adapters.current(home)
        assert folder is not None and passport.trusted(home) is not None
        assert passport.check(home, folder) is None
        found.append(folder.name)
    return found


def test_rollback_without_a_started_server_says_so_and_starts_none(tmp_path: Path) -> None:
    certs.make(tmp_path / "c", [])
    places = ["--certs", str(tmp_path / "c"), "--state", str(tmp_path / "s")]
    done = CliRunner().invoke(main, ["rollback", "--yes", *places])
    assert done.exit_code == 1 and "run `afya-server start` first" in done.output
    assert not (tmp_path / "s").exists()
