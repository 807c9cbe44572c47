"""Joining with one file: what a coordinator writes is what a clinic unpacks, and nothing is taken over by accident."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from client import doctor, invitation, node
from client.cli import main
from model.llava import base_sha256
from scripts.federation import free_ports
from server import certs, link
from server import checkpoint as store
from server import invite as invitations
from server.cli import main as server_main
from server.settings import SettingsRejected
from tests.client.clinic import fill
from tests.server import fakes


def invite(folder: Path, clinic: str, base: Path, **options: Any) -> Path:
    """An invitation from a coordinator whose server does not run."""
    certs.make(folder / "certs", [], ["hub.example", "10.0.0.7"])
    side = link.Link(folder / "certs", folder / "state", free_ports(1)[0])
    assert not invitations.invite(side, clinic, folder / f"{clinic}.afya", base=base, **options)
    return folder / f"{clinic}.afya"


def call(*arguments: str) -> Result:
    done = CliRunner().invoke(main, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_one_file_makes_the_whole_federation_folder(tmp_path: Path, afya_home: Path, tiny: Path) -> None:
    file = invite(tmp_path, "lakeside", tiny)
    assert file.stat().st_mode & 0o777 == 0o600
    folder = invitation.unpack(afya_home, invitation.read(file))
    assert folder.stat().st_mode & 0o777 == 0o700
    made = tmp_path / "certs/clinics/lakeside"
    for name in ("ca.crt", "node.key"):
        assert (folder / name).read_bytes() == (made / name).read_bytes()
    assert (folder / "release.pub").read_bytes() == (tmp_path / "certs/release.pub").read_bytes()
    assert {path.name for path in folder.iterdir()} == {"ca.crt", "node.key", "release.pub", "invitation.json"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
    assert "PRIVATE" not in (folder / "invitation.json").read_text()
    connection = node.connection(afya_home)
    assert connection == node.Connection("hub.example:8443", folder / "ca.crt", folder / "node.key", 9094)
    assert invitation.record(afya_home)["base_sha256"] == base_sha256(tiny)


def test_the_same_file_again_changes_nothing_another_is_refused(tmp_path: Path, afya_home: Path, tiny: Path) -> None:
    first = invitation.read(invite(tmp_path / "one", "lakeside", tiny))
    second = invitation.read(invite(tmp_path / "two", "lakeside", tiny))
    folder = invitation.unpack(afya_home, first)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    invitation.unpack(afya_home, first)
    with pytest.raises(invitation.InvitationRejected, match="--replace"):
        invitation.unpack(afya_home, second)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    invitation.unpack(afya_home, second, replace=True)
    kept = afya_home / "federation.before-1"
    assert (kept / "node.key").read_bytes() == before[folder / "node.key"]
    assert (folder / "node.key").read_text() == second.key
    assert not list(afya_home.glob(".federation.*"))


@pytest.mark.parametrize("entry", ["server", "ca", "key", "base", "plan", "clinic", "release_key"])
def test_a_changed_file_is_refused(tmp_path: Path, afya_home: Path, tiny: Path, entry: str) -> None:
    file = invite(tmp_path, "lakeside", tiny)
    record = json.loads(file.read_bytes())
    file.write_text(json.dumps({**record, entry: "changed"}))
    done = call("join", str(file))
    assert done.exit_code == 1 and "check-sum" in done.output
    changed = {**record, entry: {"a": 1} if entry in ("server", "ca", "key", "clinic") else 7}
    changed["sha256"] = invitation.checksum(changed)
    file.write_text(json.dumps(changed))
    assert call("join", str(file)).exit_code == 1
    assert not (afya_home / "federation").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"format": "afya-invitation"}', "x" * 70_000, "[" * 60_000]
)
def test_a_file_that_is_no_invitation_is_refused(tmp_path: Path, afya_home: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    done = call("join", str(tmp_path / "f"))
    assert done.exit_code == 1 and "Traceback" not in done.output and len(done.output.splitlines()) == 1
    assert not (afya_home / "federation").exists()


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, tiny: Path) -> None:
    whole = invite(tmp_path, "lakeside", tiny).read_bytes()
    for size in range(0, len(whole) - 1, 97):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(invitation.InvitationRejected):
            invitation.read(tmp_path / "cut")


def test_a_disk_that_refuses_leaves_no_half_folder(
    tmp_path: Path, afya_home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = invite(tmp_path, "lakeside", tiny)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    done = call("join", str(file))
    assert done.exit_code == 1 and "No space left" in done.output
    assert list(afya_home.iterdir()) == []


def test_invite_overwrites_nothing_and_names_a_server_that_the_certificate_names(tmp_path: Path, tiny: Path) -> None:
    file = invite(tmp_path, "lakeside", tiny)
    before = file.read_bytes()
    places = ["--certs", str(tmp_path / "certs"), "--state", str(tmp_path / "state"), "--base-model", str(tiny)]
    done = CliRunner().invoke(server_main, ["invite", "lakeside", "--out", str(file), *places])
    assert done.exit_code == 1 and "was left as it is" in done.output and file.read_bytes() == before
    done = CliRunner().invoke(
        server_main, ["invite", "hilltop", "--out", str(tmp_path / "h"), "--server", "else.example:1", *places]
    )
    assert done.exit_code == 1 and "not for else.example" in done.output and not (tmp_path / "h").exists()
    done = CliRunner().invoke(
        server_main, ["invite", "hilltop", "--out", str(tmp_path / "h"), "--server", "10.0.0.7:9", *places]
    )
    assert done.exit_code == 0 and "when the server starts" in done.output, done.output
    assert invitation.read(tmp_path / "h").server == "10.0.0.7:9"


def test_what_the_federation_plans_is_held_against_limits_and_base(tmp_path: Path, afya_home: Path, tiny: Path) -> None:
    fill(afya_home, [], tiny, "max_rank = 4\nmin_lr = 0.01\n")
    invitation.unpack(afya_home, invitation.read(invite(tmp_path, "lakeside", tiny)))
    path = afya_home / "federation/invitation.json"
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({**record, "server": "127.0.0.1:1", "base_sha256": "0" * 64}))
    found = {check.name: check for check in doctor.examine(afya_home, node.connection(afya_home))}
    assert found["limits"].ok and found["limits"].note and "rank 8 (here 1 to 4)" in found["limits"].detail
    assert "lr 0.002" in found["limits"].detail
    assert not found["base model"].ok and "not 000000000000" in found["base model"].detail
    assert found["keys"].ok


def test_a_plan_is_what_the_last_round_asked_or_what_the_coordinator_says(
    tmp_path: Path, afya_home: Path, tiny: Path
) -> None:
    fill(afya_home, [], tiny, 'max_steps = 30\ntargets = "projector"\n')
    store.save(
        tmp_path / "state" / "rounds",
        replace(fakes.first(), config={"local_steps": 24, "targets": "decoder+projector"}),
    )
    file = invite(tmp_path, "lakeside", tiny)
    plan = json.loads(file.read_bytes())["plan"]
    assert (plan["local-steps"], plan["targets"], plan["batch-size"]) == (24, "decoder+projector", 16)
    invitation.unpack(afya_home, invitation.read(file))
    limits_ = next(check for check in doctor.examine(afya_home, None) if check.name == "limits")
    assert limits_.note and "local-steps" not in limits_.detail
    assert "targets decoder+projector (here not decoder)" in limits_.detail
    with pytest.raises(SettingsRejected, match="rank = -5"):
        invite(tmp_path, "hilltop", tiny, chosen={"rank": -5})
    told = invite(tmp_path, "hilltop", tiny, chosen={"local-steps": 99})
    assert json.loads(told.read_bytes())["plan"]["local-steps"] == 99


def test_a_folder_from_the_coordinator_still_works(tmp_path: Path, afya_home: Path) -> None:
    certs.make(tmp_path / "c", ["north"])
    found = node.connection(afya_home, "127.0.0.1:8443", tmp_path / "c/clinics/north")
    assert found is not None and found.key == tmp_path / "c/clinics/north/node.key"
    (tmp_path / "c/clinics/north").rename(afya_home / "federation")
    found = node.connection(afya_home, "127.0.0.1:8443")
    assert found is not None and found.key == afya_home / "federation/node.key"
    assert node.connection(afya_home) is None
