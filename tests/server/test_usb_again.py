"""Rounds by stick that are written again, in a new folder, beside a run, or for a clinic that only has its file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from client import cli as client_cli
from client import rounds_file
from model import passport, phantoms
from model.bundle import BundleRejected
from server import cli as server_cli
from server import invite, usb
from server.alone import alone
from tests.client.clinic import fill
from tests.server.sticks import CLINICS, Coordinator


@pytest.fixture
def side(tmp_path: Path, tiny: Path) -> Coordinator:
    return Coordinator(tmp_path, tiny)


def test_a_round_written_again_with_other_settings_is_answered_again_and_an_older_one_never(side: Coordinator) -> None:
    first = side.issue("first.afya")
    assert usb.issue(side.link, side.settings, first) == (1, False)
    answered = [side.reply(name, first) for name in CLINICS]
    side.settings = replace(side.settings, local_steps=9)
    again = side.root / "again.afya"
    assert usb.issue(side.link, side.settings, again) == (1, True)
    with pytest.raises(BundleRejected, match="written again since"):
        side.take(*answered)
    after = side.take(*(side.reply(name, again) for name in CLINICS))
    assert (after.round, after.changed) == (1, True)
    second = side.issue("second.afya")
    side.reply("north", second)
    for old in (first, again, second):
        with pytest.raises(BundleRejected, match="answered round 2 already"):
            rounds_file.take(side.homes["north"], old)


def test_a_new_folder_of_rounds_begins_with_round_1_at_the_clinics_too(side: Coordinator) -> None:
    first = side.issue()
    side.take(*(side.reply(name, first) for name in CLINICS))
    side.reply("north", side.issue())
    side.settings = replace(side.settings, checkpoint_dir=str(side.root / "new"), rank=3)
    other = side.issue("other.afya")
    assert rounds_file.take(side.homes["north"], other)["server-round"] == 1
    with pytest.raises(BundleRejected, match="answered round 1 already"):
        rounds_file.take(side.homes["north"], other)
    with pytest.raises(BundleRejected, match="answered round 2 already"):
        rounds_file.take(side.homes["north"], first)


def test_a_note_of_an_earlier_version_still_counts(side: Coordinator) -> None:
    home = side.homes["north"]
    public = passport.trusted(home)
    assert public is not None
    (home / rounds_file.FOLDER).mkdir()
    (home / rounds_file.FOLDER / rounds_file.ANSWERED).write_text(json.dumps({passport.name_of(public): 4}))
    assert rounds_file._answered(home) == {passport.name_of(public): (4, "")}


def test_no_round_is_written_while_a_run_is_at_work(side: Coordinator, tmp_path: Path) -> None:
    arguments = ["export-round", str(tmp_path / "r"), "--certs", str(side.link.certs), "--state", str(side.link.state)]
    with alone(side.link.state / "rounds"):
        done = CliRunner().invoke(server_cli.main, arguments)
    assert done.exit_code == 1 and "Another run is at work" in done.output and not (tmp_path / "r").exists()


def test_a_clinic_without_a_network_unpacks_its_invitation_only(side: Coordinator, tmp_path: Path, tiny: Path) -> None:
    home = fill(tmp_path / "away", phantoms.make(3, ["plain"], seed=5, size=48), tiny, "min_examples = 4")
    arguments = ["import-round", str(side.issue())]
    done = CliRunner().invoke(client_cli.main, arguments, env={"AFYA_HOME": str(home)})
    assert done.exit_code == 1 and "run `afya-client join FILE --offline`" in done.output
    invite.invite(side.link, "away", tmp_path / "away.afya", "localhost:8443", tiny)
    done = CliRunner().invoke(
        client_cli.main, ["join", str(tmp_path / "away.afya"), "--offline"], env={"AFYA_HOME": str(home)}
    )
    assert done.exit_code == 0 and "By stick" in done.output, done.output
    done = CliRunner().invoke(client_cli.main, ["import-round", str(side.issue())], env={"AFYA_HOME": str(home)})
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(client_cli.main, ["export-round", str(tmp_path / "no/x")], env={"AFYA_HOME": str(home)})
    assert done.exit_code == 1 and "is no folder; is the stick there?" in done.output
    done = CliRunner().invoke(client_cli.main, ["export-round", str(tmp_path / "x")], env={"AFYA_HOME": str(home)})
    assert done.exit_code == 0 and "The answer to round 1 is in" in done.output
