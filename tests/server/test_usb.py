"""Rounds by stick: the same adapter as over the link, bit for bit; forged, repeated, late and foreign files refused."""

import json
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from client import app, limits, rounds_file
from client import cli as client_cli
from model import adapters, passport, wire
from model.bundle import BundleRejected
from server import certs, events, rounds, usb, usb_release
from server import cli as server_cli
from tests.server import fakes
from tests.server.sticks import CLINICS, VALUES, Coordinator


@pytest.fixture
def side(tmp_path: Path, tiny: Path) -> Coordinator:
    return Coordinator(tmp_path, tiny)


def test_two_rounds_by_stick_give_the_adapter_of_the_link_bit_for_bit(
    side: Coordinator, tmp_path: Path, tiny: Path
) -> None:
    for number in (1, 2):
        file = side.issue()
        after = side.take(*(side.reply(name, file) for name in reversed(CLINICS)))
        assert (after.round, after.changed, len(after.rejected)) == (number, True, 0)
    homes = {number: side.homes[name] for number, name in enumerate(CLINICS, 1)}
    online = dict.fromkeys(homes, lambda node, message: app.train_reply(message.content, homes[node]))
    clock = fakes.Clock()
    chosen = fakes.settings(tmp_path / "online", tiny, **VALUES)
    linked = rounds.federate(fakes.FakeGrid(online), chosen, sleep=clock.sleep, clock=clock)
    for name, home in side.homes.items():
        planted = [json.loads(path.read_text())["question"] for path in (home / "training/samples").iterdir()]
        sent = (tmp_path / f"{name}.afya").read_bytes()
        assert not any(question.encode() in sent for question in planted)
    assert linked.updates == after.updates == 2
    assert all(np.array_equal(after.state[name], array) for name, array in linked.state.items())
    assert [row.examples for row in after.accepted] == [row.examples for row in linked.accepted]
    kinds = [event["event"] for event in events.read(tmp_path / "rounds")[0]]
    assert kinds.count("accepted") == 6 and kinds.count("stick") == 2


def test_a_round_is_concluded_where_its_folder_lies_now(side: Coordinator, tmp_path: Path) -> None:
    file = side.issue()
    replies = [side.reply(name, file) for name in CLINICS]
    (tmp_path / "rounds").rename(tmp_path / "moved")
    done = usb.take(side.link, tmp_path / "moved", replies)
    assert done.round == 1 and not (tmp_path / "rounds").exists()
    assert (tmp_path / "moved/round-00001").is_dir()


def test_a_release_by_stick_is_installed_with_its_passport_and_no_other_is(
    side: Coordinator, tmp_path: Path, tiny: Path
) -> None:
    file = side.issue()
    after = side.take(*(side.reply(name, file) for name in CLINICS))
    folder = usb_release.send(side.link, tmp_path / "rounds", tmp_path / "release.afya")
    home = side.homes["west"]
    name = rounds_file.install(home, tmp_path / "release.afya")
    current = adapters.current(home)
    assert current is not None and current.name == name and adapters.sha256(current) == adapters.sha256(folder)
    assert all(
        np.array_equal(adapters.load(current)[0][key], array) for key, array in wire.rounded(after.state).items()
    )
    assert (current / passport.FILE).is_file()
    data = (tmp_path / "release.afya").read_bytes()
    for wrong in (data[:-1] + bytes([data[-1] ^ 1]), data.replace(b'"alpha":16.0', b'"alpha":32.0'), file.read_bytes()):
        (tmp_path / "wrong.afya").write_bytes(wrong)
        with pytest.raises(BundleRejected):
            rounds_file.install(home, tmp_path / "wrong.afya")
    assert adapters.current(home) == current


def test_a_round_file_that_is_not_the_coordinators_is_refused_by_the_clinic(
    side: Coordinator, tmp_path: Path, tiny: Path
) -> None:
    home, file = side.homes["north"], side.issue()
    data = file.read_bytes()
    (tmp_path / "changed.afya").write_bytes(data.replace(b'"local-steps":8', b'"local-steps":9'))
    other = Coordinator(tmp_path / "other", tiny)
    for wrong in (tmp_path / "changed.afya", other.issue()):
        with pytest.raises(BundleRejected, match="not from this clinic's coordinator"):
            rounds_file.take(home, wrong)
    flipped = bytearray(data)
    flipped[-1] ^= 1
    (tmp_path / "flipped.afya").write_bytes(flipped)
    with pytest.raises(BundleRejected, match="changed after it was signed"):
        rounds_file.take(home, tmp_path / "flipped.afya")
    (home / "federation/release.pub").unlink()
    with pytest.raises(BundleRejected, match=r"release\.pub is missing"):
        rounds_file.take(home, file)
    assert not (home / "rounds").exists()


def test_a_clinic_answers_a_round_once_and_never_an_older_one(side: Coordinator) -> None:
    first = side.issue("first.afya")
    replies = [side.reply(name, first) for name in CLINICS]
    with pytest.raises(BundleRejected, match="has answered round 1 already"):
        rounds_file.take(side.homes["north"], first)
    side.take(*replies)
    second = side.issue("second.afya")
    rounds_file.take(side.homes["north"], second)
    with pytest.raises(BundleRejected, match="has answered round 2 already"):
        rounds_file.take(side.homes["north"], first)


def test_the_clinics_limits_hold_for_a_stick_too(side: Coordinator) -> None:
    home = side.homes["north"]
    with open(home / "afya.toml", "a") as text:
        text.write("max_steps = 7\nmin_steps = 1\n")
    with pytest.raises(limits.Refused, match="local-steps is 8"):
        rounds_file.take(home, side.issue())
    with pytest.raises(BundleRejected, match="no answer yet"):
        rounds_file.give(home, side.root / "none.afya")


def test_replies_that_are_not_what_they_should_be_stop_the_round_before_anything_changes(
    side: Coordinator, tmp_path: Path
) -> None:
    file = side.issue()
    replies = {name: side.reply(name, file) for name in CLINICS}
    before = side.seen()
    good = replies["north"].read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    bad = {
        "changed after it was signed": bytes(flipped),
        "was not signed by north": good.replace(b'"num-examples":', b'"num-exomples":'),
        "was not signed by south": good.replace(*(json.dumps(_key(side, n)).encode() for n in ("north", "south"))),
        "no round file": b"PK\x03\x04" + good,
        "a round, not a reply": file.read_bytes(),
        "cut off": good[:-4],
    }
    for words, data in bad.items():
        (tmp_path / "bad.afya").write_bytes(data)
        with pytest.raises(BundleRejected, match=words):
            side.take(tmp_path / "bad.afya", replies["south"], replies["west"])
    with pytest.raises(BundleRejected, match="second reply of south"):
        side.take(replies["south"], replies["south"], replies["west"])
    assert side.seen() == before
    assert side.take(*replies.values()).changed
    with pytest.raises(BundleRejected, match="was not written to a stick yet"):  # replayed after the round
        side.take(*replies.values())
    side.issue("next.afya")
    with pytest.raises(BundleRejected, match="answers another file"):  # stale
        side.take(*replies.values())


def _key(side: Coordinator, name: str) -> str:
    return " ".join((side.link.certs / "clinics" / name / "node.pub").read_text().split()[:2])


def test_a_key_of_nobody_and_a_revoked_key_are_refused(side: Coordinator, tmp_path: Path) -> None:
    from server import members

    file = side.issue()
    replies = [side.reply(name, file) for name in CLINICS]
    certs.make(tmp_path / "elsewhere", ["north"])
    stranger = side.homes["north"]
    shutil.copy(tmp_path / "elsewhere/clinics/north/node.key", stranger / "federation/node.key")
    shutil.rmtree(stranger / "rounds")
    replies[0].unlink()  # another key's file would not be written over
    with pytest.raises(BundleRejected, match="a key that no clinic of this federation has"):
        side.take(side.reply("north", file), *replies[1:])
    members.revoke(side.link, "south")
    with pytest.raises(BundleRejected, match="There are 2 clinics"):
        side.take(*replies[1:])


def test_an_update_beyond_the_cap_is_rejected_by_the_same_gate(side: Coordinator, tiny: Path) -> None:
    side.settings = fakes.settings(side.root / "rounds", tiny, **{**VALUES, "min_clinics": 1, "max_update_norm": 1e-9})
    file = side.issue()
    after = side.take(side.reply("north", file))
    assert not after.changed
    assert "above the cap" in next(row.reason for row in after.rejected if row.clinic == "north")
    assert {row.clinic for row in after.rejected} == set(CLINICS)


def test_the_commands_say_what_they_did_and_refuse_in_one_sentence(
    side: Coordinator, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ["--certs", str(side.link.certs), "--state", str(side.link.state), "--out", str(tmp_path / "rounds")]
    values = {"rank": 2, "local-steps": 8, "min-clinics": 1, "base-model": tiny, "proximal-mu": 0.1}
    sets = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]

    def call(group: click.Command, *words: object) -> tuple[int, str]:
        done = CliRunner().invoke(group, [str(word) for word in words])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    monkeypatch.setenv("AFYA_HOME", str(side.homes["west"]))
    monkeypatch.setattr("client.courtesy.be_nice", lambda level: None)
    assert call(server_cli.main, "export-round", tmp_path / "r.afya", *place, *sets)[0] == 0
    code, text = call(client_cli.main, "import-round", tmp_path / "r.afya")
    assert code == 0 and "Round 1: 8 steps" in text
    code, text = call(client_cli.main, "import-round", tmp_path / "r.afya")
    assert code == 1 and "has answered round 1 already" in text and "Traceback" not in text
    for _ in range(2):
        assert call(client_cli.main, "export-round", tmp_path / "a.afya")[0] == 0
    before = (tmp_path / "r.afya").read_bytes()
    code, text = call(client_cli.main, "export-round", tmp_path / "r.afya")
    assert code == 1 and "is there already and is something else" in text
    code, text = call(server_cli.main, "export-round", tmp_path / "a.afya", *place, *sets)
    assert code == 1 and "is there already and is something else" in text
    assert (tmp_path / "r.afya").read_bytes() == before
    code, text = call(server_cli.main, "import-round", tmp_path / "a.afya", *place)
    assert code == 0 and "1 of 3 replies aggregated" in text
    code, text = call(server_cli.main, "import-round", tmp_path / "a.afya", *place)
    assert code == 1 and text.startswith("Error: Round 2 was not written to a stick yet")
    code, text = call(client_cli.main, "budget", "--json")
    assert code == 0 and json.loads(text) == {"dp": False, "epsilon": 0.0, "budget": 8.0, "delta": 1e-05, "rounds": []}
