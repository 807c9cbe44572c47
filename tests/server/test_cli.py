"""afya-server as a coordinator meets it: settings by name, faults in one sentence, nothing half started."""

import json
import socket
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from scripts.federation import free_ports
from server import certs, link
from server import checkpoint as store
from server.cli import main
from server.follow import sentence
from tests.server.fakes import first, settings


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_certs_lists_what_it_wrote(tmp_path: Path) -> None:
    code, text = call("certs", "--out", str(tmp_path / "c"), "--clinic", "north", "--json")
    assert code == 0
    assert {Path(path).name for path in json.loads(text)} >= {"ca.key", "server.pem", "node.key", "node.pub"}


def test_start_names_every_fault_and_starts_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text = call(
            "start", "--certs", str(tmp_path / "c"), "--state", str(tmp_path / "s"), "--link-port", str(port)
        )
    assert code == 1
    for word in ("ca.crt is missing", "afya-server certs", f"127.0.0.1:{port} cannot be used"):
        assert word in text
    assert not (tmp_path / "s").exists()


def test_settings_are_listed_and_checked(tmp_path: Path) -> None:
    code, text = call("rounds", "--list")
    assert code == 0 and "local-steps = 40" in text
    assert call("rounds", "--set", "nonsense=1")[0] == 2
    assert call("rounds", "--set", "rank=many")[0] == 2
    code, text = call("rounds", "--state", str(tmp_path), "--set", "rank=0")
    assert code == 1 and "rank = 0 is not between 1 and 256" in text


def test_a_stopped_run_goes_on_with_its_own_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from server import cli

    assert cli.so_far(tmp_path, {}) == {} and not capsys.readouterr().err
    was = settings(tmp_path, tmp_path, num_server_rounds=24, lr=0.004, rollback=0, signing_key="old")
    store.save(tmp_path, replace(first(), round=3, config=asdict(was)))
    found = cli.so_far(tmp_path, {"lr": 0.002})
    assert (found["num-server-rounds"], found["lr"], found["gate"]) == (24, 0.004, "auto")
    assert not {"checkpoint-dir", "signing-key", "rollback"} & set(found)
    said = capsys.readouterr().err
    assert "after round 3" in said and "num-server-rounds 24" in said and "lr 0.004" not in said and "gate" not in said


def test_the_superlink_is_started_with_the_safe_flags_only(tmp_path: Path) -> None:
    certs.make(tmp_path / "c", [])
    made = link.Link(tmp_path / "c", tmp_path / "s", 8123)
    line, env = made.command(), made.environment()
    assert "--enable-supernode-auth" in line and "--disable-runtime-dependency-installation" in line
    assert line[line.index("--host") + 1] == "127.0.0.1" and "--insecure" not in line
    assert env["FLWR_TELEMETRY_ENABLED"] == "0" and env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


def test_events_read_well() -> None:
    lost = {"event": "rejected", "round": 1, "clinic": "north", "reason": "non-finite"}
    assert sentence(lost) == "  north: rejected, non-finite"
    assert sentence({"at": "x", "event": "resumed", "round": 3}) == "Resumed: round 3"


def test_the_port_of_the_superlink_is_found_where_the_server_wrote_it(tmp_path: Path) -> None:
    assert link.existing(tmp_path / "c", tmp_path / "s").port == 8000
    link.configure(link.Link(tmp_path / "c", tmp_path / "s", 8123))
    assert link.existing(tmp_path / "c", tmp_path / "s").address == "127.0.0.1:8123"


def test_a_second_server_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    certs.make(tmp_path / "c", [])
    ports = free_ports(3)
    first = link.Link(tmp_path / "c", tmp_path / "s", ports[0])
    first.state.mkdir()
    with link._sole(first.state), pytest.raises(link.LinkError, match=r"A server is at work in .*/s; stop it first"):
        link.serve(link.Link(tmp_path / "c", tmp_path / "s", ports[1]), ("127.0.0.1", ports[2]), print)
    assert not (first.state / "flower").exists(), "the first one's address was left alone"
    assert "choose two ports" in link.faults(first, ("127.0.0.1", ports[0]))[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["start", "--listen", "127.0.0.1:70000"], "is not HOST:PORT"),
        (["start", "--link-port", "99999"], "99999 is not in the range"),
        (["rounds", "--set", "rank"], "write rank=VALUE"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: list[str], told: str, tmp_path: Path) -> None:
    places = ["--certs", str(tmp_path / "c"), "--state", str(tmp_path / "s")]
    done = CliRunner().invoke(main, [*arguments, *places])
    assert done.exit_code == 2 and told in done.output


def test_another_name_for_the_server_needs_another_certificate_and_that_is_said(tmp_path: Path) -> None:
    certs.make(tmp_path, [])
    done = CliRunner().invoke(main, ["certs", "--out", str(tmp_path), "--host", "otherhost.example.org"])
    assert done.exit_code == 1 and "does not name otherhost.example.org; remove it" in done.output
    assert CliRunner().invoke(main, ["certs", "--out", str(tmp_path), "--host", "localhost"]).exit_code == 0
