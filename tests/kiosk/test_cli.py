"""The clinic's commands: what they write, what they refuse, and the flags that keep the kiosk on its machine."""

import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from kiosk.cli import kiosk_environment, main, streamlit_arguments
from kiosk.store import CaseStore
from tests.kiosk.conftest import picture


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.output


def test_init_explains_itself_and_never_overwrites(afya_home: Path) -> None:
    assert run("init")[0] == 0
    assert "bits = 4" in (afya_home / "afya.toml").read_text() and (afya_home / "kiosk.db").is_file()
    (afya_home / "afya.toml").write_text("bits = 8\n")
    assert "was left as it is" in run("init")[1] and (afya_home / "afya.toml").read_text() == "bits = 8\n"


def test_verify_and_backup(afya_home: Path, tmp_path: Path) -> None:
    code, output = run("verify")
    assert code == 1 and "There is no case database" in output
    store = CaseStore(afya_home / "kiosk.db")
    store.add_case(picture(), "NA", "Bright?")
    store.close()
    assert json.loads(run("verify", "--json")[1]) == {
        "cases": 1, "questions": 1, "problems": [], "training_samples": 0}  # fmt: skip
    code, output = run("backup", str(tmp_path / "copy.db"))
    assert code == 0 and "1 cases with 1 questions" in output and (tmp_path / "copy.db").is_file()
    assert run("backup", str(tmp_path / "copy.db"))[0] == 1
    assert run("backup", str(tmp_path / "copy.db"), "--yes")[0] == 0
    data = bytearray((afya_home / "kiosk.db").read_bytes())
    data[data.index(picture().png[-60:-20])] ^= 1
    (afya_home / "kiosk.db").write_bytes(data)
    code, output = run("verify")
    assert code == 1 and "case 1: the picture is not the one that was saved" in output


def test_start_refuses_with_a_sentence(afya_home: Path, tmp_path: Path) -> None:
    code, output = run("start", "--model", str(tmp_path))
    assert code == 1 and "There is no model in" in output and "--model" in output
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, output = run("start", "--model", str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert code == 1 and "another program uses port" in output
    (afya_home / "afya.toml").write_text("bits = 5\n")
    code, output = run("start")
    assert code == 1 and "bits must be one of" in output
    assert run("start", "--bits", "5")[0] == 2


def test_the_flags_keep_it_on_this_machine_and_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = " ".join(streamlit_arguments(8501))
    for flag in (
        "--server.address 127.0.0.1",
        "--browser.gatherUsageStats false",
        "--client.showErrorDetails none",
        "--client.toolbarMode minimal",
        "--server.maxUploadSize 50",
        "--server.fileWatcherType none",
        "--server.headless true",
        "--server.enableAgentApi false",
        "--server.allowedHosts 127.0.0.1",
    ):
        assert flag in flags
    environment = kiosk_environment(Path("some/model"), "8")
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"
    assert Path(environment["AFYA_MODEL"]).is_absolute() and environment["AFYA_BITS"] == "8"


def test_a_mistyped_home_is_no_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFYA_HOME", str(tmp_path / "nohome"))
    code, output = run("backup", str(tmp_path / "copy.db"))
    assert code == 1 and "is AFYA_HOME right?" in output
    assert not (tmp_path / "nohome/kiosk.db").exists() and not (tmp_path / "copy.db").exists()
