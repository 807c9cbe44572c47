"""What the service and the clinic's home share: one afya.toml, one ledger, one seal, keys of the right owner.

Also what the commands in the home say when the service works with something else, and the refusal without a firewall.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from client import as_root, doctor, firewall, invitation, ledger, limits, node, service
from client.cli import main
from client.unit import SETTINGS, UNIT, USER, WATCH
from server import certs
from tests.client.clinic import fill
from tests.client.test_join import invite

ROOT = Path(__file__).resolve().parent.parent.parent
KIOSK_USER, CLIENT_USER = 1, 65534  # daemon, nobody: there on every Debian


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.fixture
def link(afya_home: Path, tmp_path: Path, tiny: Path) -> node.Connection:
    certs.make(tmp_path / "c", ["north"])
    fill(afya_home, [], tiny)
    shutil.copytree(tmp_path / "c/clinics/north", afya_home / "federation")
    found = node.connection(afya_home, "127.0.0.1:1")
    assert found is not None
    return found


@pytest.fixture
def installed(link: node.Connection, afya_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of units after `join --service`, with the settings handed over."""
    units = tmp_path / "units"
    units.mkdir()
    for name, text in service.fill(afya_home, link).items():
        (units / name).write_text(text)
    (afya_home / "run").mkdir()
    monkeypatch.setattr("client.unit.UNITS", units)
    hand_over(afya_home, units)
    return units


def hand_over(home: Path, units: Path) -> None:
    """What systemd does when the settings have changed: the one command of the unit, in the unit's folder."""
    lines = dict(line.split("=", 1) for line in (units / SETTINGS).read_text().splitlines() if "=" in line)
    assert lines["WorkingDirectory"] == str(home)
    command = lines["ExecStart"].removeprefix("/bin/sh -ec '").removesuffix("'").replace("sleep 1; ", "")
    subprocess.run(["/bin/sh", "-ec", command], cwd=home, check=True)


def faults(home: Path, link: node.Connection) -> dict[str, str]:
    return {check.name: check.detail for check in doctor.examine_service(home, link) if not check.ok}


def test_the_service_follows_afya_toml_and_nothing_but_its_copy(
    installed: Path, afya_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (afya_home / "afya.toml").read_text()
    (tmp_path / "new").write_text(
        f"bits = 8\n{text}dp = true\nhours = '22:00-06:00'\nmin_cases = 40\n".replace("min_cases = 1\n", "")
    )
    os.replace(tmp_path / "new", afya_home / "afya.toml")  # as an editor does
    hand_over(afya_home, installed)
    copy, state = afya_home / "run/afya.toml", tmp_path / "state"
    assert copy.stat().st_mode & 0o777 == 0o640 and [path.name for path in copy.parent.iterdir()] == ["afya.toml"]
    state.mkdir()
    (state / "afya.toml").write_text("[client]\ndp = false\n")  # made by the service itself: nobody reads it
    monkeypatch.setenv("AFYA_SETTINGS", str(copy))
    found = limits.read_limits(state)
    assert (found.dp, found.hours, found.min_cases) == (True, "22:00-06:00", 40)
    assert limits.read_settings(state)["bits"] == 8
    (afya_home / "afya.toml").unlink()
    hand_over(afya_home, installed)
    assert limits.read_limits(state) == limits.Limits()  # what the commands in the home say, too
    copy.unlink()
    with pytest.raises(limits.SettingsWrong, match="afya-client-settings"):
        limits.read_limits(state)


def test_settings_that_did_not_reach_the_service_are_a_fault_in_every_command(
    installed: Path, link: node.Connection, afya_home: Path
) -> None:
    assert "settings" not in faults(afya_home, link) and "FAULT" not in call("status")[1] + call("budget")[1]
    with open(afya_home / "afya.toml", "a") as settings:
        settings.write("dp = true\n")
    assert "systemctl start afya-client-settings.service" in faults(afya_home, link)["settings"]
    for command in ("status", "budget"):
        code, text = call(command)
        assert code == 0 and "FAULT     the service does not work with" in text
        assert "systemctl start" in json.loads(call(command, "--json")[1])["fault"]
    hand_over(afya_home, installed)
    assert "settings" not in faults(afya_home, link) and "FAULT" not in call("status")[1] + call("budget")[1]
    (afya_home / "run/afya.toml").unlink()  # as after an earlier version, which handed a copy over once and for all
    assert "join --service" in faults(afya_home, link)["settings"]


def test_a_service_that_was_set_up_for_something_else_is_a_fault(
    installed: Path, link: node.Connection, afya_home: Path, tmp_path: Path, tiny: Path
) -> None:
    assert "service" not in faults(afya_home, link)
    elsewhere = node.Connection("127.0.0.1:2", link.ca, link.key)
    assert "(ExecStart)" in faults(afya_home, elsewhere)["service"]
    (link.ca.parent / "release.pub").write_text("another federation")
    assert "(X-Invitation)" in faults(afya_home, link)["service"]
    (link.ca.parent / "release.pub").unlink()
    shutil.copytree(tiny, tmp_path / "other")
    fill(afya_home, [], tmp_path / "other")
    assert "(BindReadOnlyPaths)" in faults(afya_home, link)["service"]
    (installed / WATCH).unlink()
    assert "PathChanged" in faults(afya_home, link)["service"]
    assert doctor.examine_service(tmp_path, link) == []  # another home of the same machine


def test_without_nftables_the_service_is_refused_unless_that_is_accepted(
    installed: Path, link: node.Connection, afya_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "After=nftables.service\nPartOf=nftables.service\n" in service.fill(afya_home, link)[UNIT]
    monkeypatch.setattr(firewall, "program", lambda: "")
    assert "install the package nftables" in faults(afya_home, link)["firewall"]
    with pytest.raises(service.ServiceError, match=r"install the package nftables, or pass --without-firewall"):
        service.plan(afya_home, link)
    made = service.plan(afya_home, link, without_firewall=True)
    assert "nft -f" not in made.script and "PartOf=" not in made.units[UNIT]
    assert f"echo 'nftables is not installed: the user {USER} can reach every port" in made.script


def test_a_machine_has_one_service_and_the_second_clinic_is_told_whose(
    installed: Path, link: node.Connection, tmp_path: Path, tiny: Path
) -> None:
    other = fill(tmp_path / "other", [], tiny)
    with pytest.raises(service.ServiceError, match=r"that of .*; run `sudo AFYA_HOME=.* afya-client leave` first"):
        service.plan(other, link)


def test_what_the_script_says_is_shown_when_it_succeeds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert as_root.run("echo well; echo look >&2", "Not done") == "look\nwell"
    with pytest.raises(as_root.ScriptFailed, match="Not done: broken"):
        as_root.run("echo well; echo broken >&2; exit 1", "Not done")
    monkeypatch.setattr(as_root, "SECONDS", 0.1)
    with pytest.raises(as_root.ScriptFailed, match=r"Not done: it took longer"):
        as_root.run("sleep 9", "Not done")


def test_leaving_needs_a_service_of_this_home_and_is_confirmed(
    installed: Path, afya_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = CliRunner().invoke(main, ["leave"], input="n\n")
    assert done.exit_code == 1 and not (afya_home / "afya-client-leave.sh").exists()
    done = CliRunner().invoke(main, ["leave", "--yes"])
    script = (afya_home / "afya-client-leave.sh").read_text()
    assert done.exit_code == 0 and f"sudo sh {afya_home / 'afya-client-leave.sh'}" in done.output
    assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0
    lines = script.splitlines()
    assert lines[-1] == "systemctl daemon-reload" and str(installed / UNIT) in lines[-2]  # last: may be run again
    (afya_home / "afya.toml").write_text("broken [")
    shutil.rmtree(afya_home / "training")
    assert CliRunner().invoke(main, ["leave", "--yes"]).exit_code == 0
    (installed / UNIT).write_text("another home's")
    done = CliRunner().invoke(main, ["leave", "--yes"])
    assert done.exit_code == 1 and "No service is installed for" in done.output


def test_a_second_ledger_stops_the_script_before_anything_is_changed(
    link: node.Connection, afya_home: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    ledger.charge(state, ledger.entry(1, 4.0, 0.2, 8), 8.0, 1e-5)
    script = service.plan(afya_home, link, state).script
    done = subprocess.run(["sh", "-s"], input=script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"move the folder to {afya_home}/privacy" in done.stderr
    assert not (afya_home / "privacy").exists() and len(ledger.read(state)) == 1


@pytest.fixture
def clinic() -> Iterator[Path]:
    """A home of the kiosk's user with the modes of `join --service`; others may pass through it, as systemd binds."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    root = Path(tempfile.mkdtemp(prefix="afya-home-"))
    home = root / "clinic"
    for folder in (root, home, root / "model"):
        folder.mkdir(exist_ok=True)
        os.chmod(folder, 0o755)
    os.chown(home, KIOSK_USER, KIOSK_USER)
    lines = service.modes(home, root / "model", "nogroup")
    subprocess.run(["sh", "-e"], input="\n".join(lines), text=True, check=True)
    os.chmod(home, 0o711)
    yield home
    shutil.rmtree(root)


def as_users(home: Path, *steps: str) -> list[object]:
    """What `tests/client/other_user.py` says of each step."""
    line = [sys.executable, "-m", "tests.client.other_user", str(home), *steps]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(text) for text in done.stdout.splitlines()]


def test_service_and_home_spend_one_budget_and_seal_the_same_pictures(clinic: Path) -> None:
    client, kiosk, before = f"{CLIENT_USER}::", f"{KIOSK_USER}:{CLIENT_USER}:", f"{KIOSK_USER}::"
    steps = [client + "charge", kiosk + "charge", client + "charge", client + "count", client + "seal", kiosk + "seal"]
    one, two, three, count, key, same = as_users(clinic, *steps)
    assert 0 < float(str(one)) < float(str(two)) < float(str(three)) and count == 3
    assert key == same and len(str(key)) == 64
    told = as_users(clinic, before + "count", before + "charge")  # a login from before the service was set up
    assert all("log out and in again" in str(text) and str(text).count(". ") == 0 for text in told)
    assert len(ledger.read(clinic)) == 3


def test_what_root_unpacks_belongs_to_the_clinics_user(tmp_path: Path, clinic: Path, tiny: Path) -> None:
    given = invitation.read(invite(tmp_path, "lakeside", tiny))
    folder = invitation.unpack(clinic, given)
    everything = (folder, *folder.iterdir())
    assert {path.stat().st_uid for path in everything} == {KIOSK_USER}
    for path in everything:  # as an earlier version left them
        os.chown(path, 0, 0)
    for told in as_users(clinic, *(f"{KIOSK_USER}::{deed}" for deed in ("record", "unpack", "keys", "server"))):
        assert f"may not be read by this user; run `sudo chown -R $USER: {folder}`" in str(told)
    os.link(folder / "node.key", tmp_path / "another-name")
    invitation.unpack(clinic, given)
    owners = {path.name: path.stat().st_uid for path in everything}
    assert owners.pop("node.key") == 0 and set(owners.values()) == {KIOSK_USER}  # two names: it may be another's file


def test_the_clinics_user_is_told_to_log_in_again(
    tmp_path: Path, clinic: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certs.make(tmp_path / "c", ["north"])
    fill(clinic, [], tiny)
    found = node.connection(clinic, "127.0.0.1:1", tmp_path / "c/clinics/north")
    assert found is not None
    monkeypatch.setattr(firewall, "program", lambda: "/usr/sbin/nft")
    assert "daemon: log out and in again, then start the kiosk anew" in service.plan(clinic, found).script
    monkeypatch.setattr("client.unit.installed", lambda home: True)
    monkeypatch.setattr("client.unit.USER", "nogroup")
    monkeypatch.setattr(os, "geteuid", lambda: KIOSK_USER)
    monkeypatch.setattr(os, "getgroups", lambda: [KIOSK_USER])
    assert "log out and in again" in faults(clinic, found)["group"]
    monkeypatch.setattr(os, "getgroups", lambda: [KIOSK_USER, CLIENT_USER])
    assert "group" not in faults(clinic, found)
