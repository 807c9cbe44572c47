"""afya-client as an IT person meets it: every fault named at once, one plain sentence, no trace."""

import json
import os
import socket
import tomllib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from client import doctor, limits, node
from client.cli import main
from model import adapters, phantoms
from model.llava import base_sha256
from scripts.federation import free_ports
from server import certs
from tests.client.clinic import fill
from tests.model.signed import TRAPS, at_once


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_doctor_names_every_fault_at_once(afya_home: Path, tmp_path: Path) -> None:
    afya_home.chmod(0o755)
    (afya_home / "afya.toml").write_text(f"model = {json.dumps(str(tmp_path / 'nowhere'))}\n[client]\nmax_rank = 1.5\n")
    (afya_home / "adapters").mkdir()
    (afya_home / "adapters/current.json").write_text("{")
    code, text = call("doctor", "--server", "127.0.0.1:1", "--json")
    faults = {check["name"]: check["detail"] for check in json.loads(text) if not check["ok"]}
    assert code == 1
    assert set(faults) == {"home", "limits", "base model", "samples", "adapter", "keys", "server"}
    assert "chmod 700" in faults["home"] and "afya-client rollback" in faults["adapter"]


def test_join_refuses_in_one_sentence_when_something_is_wrong(afya_home: Path, tiny: Path) -> None:
    fill(afya_home, [], tiny)
    code, text = call("join")
    assert code == 1 and "--server HOST:PORT" in text and "Traceback" not in text


def test_status_and_rollback(afya_home: Path, tiny: Path, tmp_path: Path) -> None:
    fill(afya_home, phantoms.make(1, ["plain"], seed=0, size=32), tiny)
    state = adapters.initial(tiny, 2, 8.0, "decoder", 0)
    adapters.save(tmp_path / "a", state, adapters.spec_of(state, 8.0, base_sha256(tiny)))
    name = adapters.install(afya_home, tmp_path / "a", evidence={"round": 4})
    code, text = call("status", "--json")
    found = json.loads(text)
    assert code == 0 and found["adapter"]["name"] == name and found["samples"] > 0
    assert found["limits"]["max_steps"] == 500
    code, text = call("rollback", "--yes")
    assert code == 0 and "bare base model" in text
    assert json.loads(call("status", "--json")[1])["adapter"] is None


@pytest.mark.parametrize("trap", TRAPS)
def test_what_a_hostile_client_leaves_for_a_pointer_stops_no_command(
    afya_home: Path, tiny: Path, trap: Callable[[Path], None]
) -> None:
    fill(afya_home, phantoms.make(1, ["plain"], seed=0, size=32), tiny)
    (afya_home / "adapters").mkdir()
    trap(afya_home / "adapters/current.json")
    code, text = at_once(lambda: call("status"))
    assert code == 1 and "afya-client rollback" in text
    faults = {check.name for check in at_once(lambda: doctor.examine(afya_home, None)) if not check.ok}
    assert "adapter" in faults
    code, text = at_once(lambda: call("rollback", "--yes"))
    assert code == 0 and "bare base model" in text
    assert call("status")[0] == 0


def test_the_supernode_is_started_with_the_safe_flags_only(afya_home: Path, tmp_path: Path) -> None:
    certs.make(tmp_path / "c", ["north"])
    link = node.connection(afya_home, "127.0.0.1:8443", tmp_path / "c/clinics/north", 9100)
    assert link is not None
    line, env = node.command(link), node.environment(afya_home)
    assert "--insecure" not in line and "--allow-runtime-dependency-installation" not in line
    assert line[line.index("--root-certificates") + 1].endswith("clinics/north/ca.crt")
    assert line[line.index("--host") + 1] == "127.0.0.1"
    assert env["AFYA_HOME"] == str(afya_home) and env["FLWR_HOME"].startswith(str(afya_home))
    assert env["FLWR_TELEMETRY_ENABLED"] == "0" and env["FLWR_DISABLE_UPDATE_CHECK"] == "1"


def test_the_connection_may_stand_in_afya_toml(afya_home: Path) -> None:
    (afya_home / "afya.toml").write_text('[client]\nserver = "hub.example:443"\nkey = "/k"\nport = 9200\n')
    link = node.connection(afya_home)
    assert link == node.Connection("hub.example:443", afya_home / "federation/ca.crt", Path("/k"), 9200)


@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_a_key_that_others_can_read_is_a_fault(afya_home: Path, tmp_path: Path, mode: int) -> None:
    certs.make(tmp_path / "c", ["north"])
    os.chmod(tmp_path / "c/clinics/north/node.key", mode)
    link = node.connection(afya_home, "127.0.0.1:1", tmp_path / "c/clinics/north")
    checks = {check.name: check for check in doctor.examine(afya_home, link)}
    assert not checks["keys"].ok and "chmod 600" in checks["keys"].detail


def test_the_limits_are_explained_as_lines_for_the_settings(afya_home: Path, tiny: Path) -> None:
    fill(afya_home, [], tiny, "max_rank = 7\n")
    code, text = call("limits")
    found = tomllib.loads(text)["client"]
    assert code == 0 and found["max_rank"] == 7 and set(found) == {entry.name for entry in fields(limits.Limits)}
    assert text.count("\n# ") == len(found)


def test_a_clinic_takes_part_once_and_a_port_in_use_is_named(
    afya_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        link = node.Connection("127.0.0.1:1", tmp_path / "ca", tmp_path / "key", busy.getsockname()[1])
        with pytest.raises(node.AlreadyJoined, match="choose another with --port"):
            node.join(tmp_path, link)
    node.join(afya_home, replace(link, port=free_ports(1)[0]))
    with pytest.raises(node.AlreadyJoined, match="takes part already from this computer"):
        node.join(afya_home, replace(link, port=free_ports(1)[0]))


def test_a_home_that_cannot_be_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AFYA_HOME", str(tmp_path / "file/home"))
    for command in ("doctor", "status", "join", "limits", "budget"):
        code, text = call(command)
        assert code == 1 and "cannot be this clinic's folder" in text and "AFYA_HOME" in text


def test_the_doctor_counts_patients(afya_home: Path, tiny: Path) -> None:
    fill(afya_home, phantoms.make(3, ["plain"], seed=1, size=32), tiny, "min_cases = 16")
    checks = json.loads(call("doctor", "--server", "127.0.0.1:1", "--json")[1])
    told = next(check["detail"] for check in checks if check["name"] == "samples")
    assert "of 3 patients; rounds are sat out below 16 and 16" in told
