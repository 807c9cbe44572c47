"""What `afya-server status` and the page say: from real events, from none, and from events that are damaged."""

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from streamlit.testing.v1 import AppTest

from kiosk import cli as kiosk_cli
from scripts.federation import free_ports
from server import contacts, events, guard, registry, status, status_cli
from server.cli import main

PAGE = Path(status_cli.__file__).with_name("page.py")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The folder of a server after two rounds, one of them without effect, a refused candidate and a release."""
    folder = tmp_path / "federation"
    for name in ("lakeside", "hilltop", "harbour"):
        registry.remember(folder, name, f"ssh-ecdsa {name}", "1")
    registry.remember(folder, "gone", "ssh-ecdsa gone", "2")
    registry.forget(folder, "gone")
    (folder / guard.FILE).write_text(json.dumps({"pem": {"clinic": "gone", "at": "2026-11-02T10:00:00+00:00"}}))
    log = events.Events(folder / "rounds")
    log.add("started", base_sha256="0" * 64, arrays=4, bytes=100)
    log.add("round", round=1, factor="B", clinics=["harbour", "hilltop", "lakeside"])
    values = {
        "examples": 40,
        "cases": 30,
        "norm": 0.1,
        "bytes": 500_000,
        "seconds": 30.0,
        "loss-before": 2.0,
        "loss-after": 1.0,
    }
    log.add("accepted", round=1, clinic="lakeside", **values)
    log.add("accepted", round=1, clinic="hilltop", **{**values, "examples": 120, "loss-after": 0.6})
    log.add("rejected", round=1, clinic="harbour", reason="lora_B is not finite [x](http://evil.example) <b>")
    done = {"factor": "B", "changed": True, "reason": "2 of 3 replies aggregated", "seconds": 40.0}
    log.add("round-done", round=1, **done, bytes_down=3_000_000, bytes_up=1_000_000, quality={})
    log.add("round", round=2, factor="A", clinics=["hilltop"])
    log.add("rejected", round=2, clinic="hilltop", reason=status.SILENT)
    done = {"factor": "A", "changed": False, "reason": "0 accepted replies", "seconds": 60.0}
    log.add("round-done", round=2, **done, bytes_down=1_000_000, bytes_up=0, quality={})
    log.add("examined", round=2, clinic="lakeside", rows=50, right={"installed": 20, "candidate": 35})
    log.add("not-released", round=1, reason="less right at lakeside", folder="x")
    log.add("release", round=2, folder="x", clinics=["hilltop", "lakeside"], verdict="released", summary="better")
    log.add("installed", clinic="lakeside", detail="round-0002-abc")
    log.add("not-installed", clinic="hilltop", detail="no reply before the deadline")
    log.add("finished", round=2, updates=1)
    return folder


def test_everything_is_counted_once(state: Path) -> None:
    found = status.read(state)
    clinics = {clinic.name: clinic for clinic in found.clinics}
    assert set(clinics) == {"lakeside", "hilltop", "harbour", "gone"}
    lake = clinics["lakeside"]
    assert (lake.accepted, lake.rejected, lake.bytes_up, lake.examples, lake.cases, lake.registered) == (
        1,
        0,
        500_000,
        40,
        30,
        True,
    )
    assert lake.accuracy == [{"round": 2, "rows": 50, "installed": 40.0, "candidate": 70.0}]
    assert lake.installed == "round-0002-abc" and lake.last_seen > clinics["harbour"].last_seen
    assert clinics["gone"].revoked.startswith("2026-11-02") and not clinics["gone"].registered
    assert [(row.number, row.changed, row.accepted, row.rejected) for row in found.rounds] == [
        (1, True, 2, 1),
        (2, False, 0, 1),
    ]
    assert found.rounds[0].loss_after == pytest.approx((40 * 1.0 + 120 * 0.6) / 160)
    assert found.rounds[1].loss_after is None
    assert [(row.round, row.clinic) for row in found.refusals] == [(1, "harbour"), (2, "hilltop"), (2, "hilltop")]
    assert [row.kind for row in found.releases] == ["not-released", "release"]
    assert (found.releases[1].installed, found.releases[1].refused) == (["lakeside"], ["hilltop"])
    assert found.running is None and found.trouble == ""


def test_a_reply_that_was_set_aside_counts_as_rejected_alone(state: Path) -> None:
    log = events.Events(state / "rounds")
    log.add("round", round=3, factor="B", clinics=["harbour", "lakeside"])
    for clinic, loss in (("harbour", 9.0), ("lakeside", 1.0)):
        log.add("accepted", round=3, clinic=clinic, **{"examples": 40, "bytes": 1, "seconds": 1.0, "loss-after": loss})
    log.add("set-aside", round=3, clinic="harbour", reason="its update is the furthest")
    done = {"factor": "B", "changed": True, "reason": "1 of 2 replies aggregated", "seconds": 40.0}
    log.add("round-done", round=3, **done, bytes_down=1, bytes_up=1, quality={})
    found = status.read(state)
    last, harbour = found.rounds[-1], next(clinic for clinic in found.clinics if clinic.name == "harbour")
    assert (last.accepted, last.rejected, last.loss_after) == (1, 1, 1.0)
    assert (harbour.accepted, harbour.rejected) == (0, 2) and found.refusals[-1].clinic == "harbour"


def test_a_clinic_that_is_silent_was_not_seen(state: Path) -> None:
    log = events.Events(state / "rounds")
    before = {clinic.name: clinic.last_seen for clinic in status.read(state).clinics}
    log.add("rejected", round=3, clinic="harbour", reason=status.SILENT)
    after = {clinic.name: clinic.last_seen for clinic in status.read(state).clinics}
    assert after["harbour"] == before["harbour"]


def test_a_clinic_without_a_round_is_seen_when_its_node_calls(state: Path) -> None:
    registry.remember(state, "newcomer", "key of newcomer", "9")
    clock = [0.0]
    heard = contacts.Contacts(state, lambda key: {b"k": "newcomer", b"l": "lakeside"}.get(key, ""), lambda: clock[0])
    heard.heard(b"nobody's")
    assert not (state / contacts.FILE).exists()
    assert "newcomer: never seen" in CliRunner().invoke(main, ["status", "--state", str(state)]).output
    heard.heard(b"k")
    first = contacts.read(state)
    heard.heard(b"k")
    assert contacts.read(state) == first, "the table was written a moment ago"
    clock[0] = contacts.EVERY
    heard.heard(b"l")
    found = {clinic.name: clinic.last_seen for clinic in status.read(state).clinics}
    assert found["newcomer"] >= first["newcomer"] and found["lakeside"] == contacts.read(state)["lakeside"]
    assert "newcomer: last seen 20" in CliRunner().invoke(main, ["status", "--state", str(state)]).output
    (state / contacts.FILE).write_text("not json", encoding="utf-8")
    assert status.read(state).clinics
    contacts.Contacts(state, lambda _: "newcomer").heard(b"k")
    assert set(contacts.read(state)) == {"newcomer"}, "a damaged table is made anew"


def test_the_command_says_it_and_so_does_json(state: Path) -> None:
    done = CliRunner().invoke(main, ["status", "--state", str(state)])
    assert done.exit_code == 0, done.output
    for words in (
        "1 changed the adapter, 1 did not; 100 s, 5.0 MB",
        "gone: key revoked on 2026-11-02",
        "1 accepted, 0 rejected, 0.5 MB; loss 2.000 -> 1.000; right 70.0 % of 50 sealed questions (before: 40.0 %)",
        "round 1, harbour: lora_B is not finite",
        "round 1 held back: less right at lakeside",
        "round 2 released: installed at lakeside, not at hilltop",
    ):
        assert words in done.output, done.output
    done = CliRunner().invoke(main, ["status", "--state", str(state), "--json"])
    record = json.loads(done.output)
    assert record["rounds"][0]["bytes_down"] == 3_000_000 and record["clinics"][3]["accuracy"][0]["candidate"] == 70.0


def test_nothing_yet_is_a_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["status", "--state", str(tmp_path / "nowhere")])
    assert done.exit_code == 0 and status_cli.NOTHING in done.output
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_table_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "registered.json").write_text("{")
    done = CliRunner().invoke(main, ["status", "--state", str(tmp_path)])
    assert done.exit_code == 1 and "cannot be read" in done.output and "Traceback" not in done.output


def test_a_damaged_line_is_told_and_hides_nothing_else(state: Path) -> None:
    with open(state / "rounds" / events.FILE, "a") as out:
        out.write(
            '{"event": "accepted", "round": 9}\n{"event": "round-done", "round": "x"}\nnot json\n{"event": "round"'
        )
    found = status.read(state)
    assert len(found.rounds) == 2 and "cannot be read" in found.trouble
    events.Events(state / "rounds2").add("round", round=4, factor="A", clinics=[])
    assert status.read(state, state / "rounds2").running == 4


def draw(monkeypatch: pytest.MonkeyPatch, folder: Path) -> AppTest:
    monkeypatch.setenv("AFYA_SERVER_STATE", str(folder))
    test = AppTest.from_file(str(PAGE), default_timeout=30).run()
    assert not test.exception, test.exception[0].message
    return test


def test_the_page_shows_clinics_rounds_rejections_releases(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = draw(monkeypatch, state)
    assert [heading.value for heading in test.subheader] == [
        "Clinics",
        "Rounds",
        "Accuracy on sealed sets",
        "Rejections",
        "Releases",
    ]
    numbers = {metric.label: metric.value for metric in test.metric}
    assert numbers["Clinics that took part"] == "2" and numbers["Rounds without effect"] == "1"
    assert numbers["Moved"] == "5.0 MB" and numbers["Running"] == "nothing"
    clinics, rounds, refusals = (frame.value for frame in test.dataframe)
    assert list(clinics["clinic"]) == ["gone", "harbour", "hilltop", "lakeside"]
    assert list(clinics["key"]) == ["revoked 2026-11-02", "registered", "registered", "registered"]
    assert list(rounds["number"]) == [2, 1] and list(refusals["clinic"]) == ["hilltop", "hilltop", "harbour"]
    assert len(test.get("arrow_vega_lite_chart")) + len(test.get("vega_lite_chart")) == 4
    shown = "\n".join(element.value for element in test.markdown)
    assert "round 2 released" in shown.replace("\\", "") and "](http" not in shown
    assert draw(monkeypatch, state).button[0].click().run().exception == []


def test_the_page_of_an_empty_folder_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [element.value for element in draw(monkeypatch, tmp_path).info] == [status_cli.NOTHING]
    (tmp_path / "registered.json").write_text("{")
    assert "cannot be read" in draw(monkeypatch, tmp_path).error[0].value


def test_the_page_has_the_kiosks_safe_flags() -> None:
    def flags(arguments: list[str]) -> dict[str, str]:
        return dict(zip(arguments[2::2], arguments[3::2], strict=True))

    own, kiosk = flags(status_cli.streamlit_arguments(8502)), flags(kiosk_cli.streamlit_arguments(8502))
    safe = {name for name in kiosk if not name.startswith("--theme")} - {"--server.maxUploadSize"}
    assert {name: own.get(name) for name in safe} == {name: kiosk[name] for name in safe}


@pytest.mark.slow
def test_the_page_is_served_on_loopback_only(state: Path, tmp_path: Path) -> None:
    port = free_ports(1)[0]
    command = [sys.executable, "-c", "from server.cli import main; main()", "page", "--state", str(state)]
    with open(tmp_path / "log", "wb") as log:
        child = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT, env={**os.environ}
        )
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/_stcore/health", trust_env=False).text == "ok":
                    break
            time.sleep(0.3)
        else:
            pytest.fail((tmp_path / "log").read_text())
        with socket.socket() as elsewhere:
            assert elsewhere.connect_ex((_own_address(), port)) != 0
    finally:
        child.terminate()
        child.wait(20)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = CliRunner().invoke(main, ["page", "--port", str(taken.getsockname()[1])])
    assert done.exit_code == 1 and "choose another" in done.output


def _own_address() -> str:
    """This machine's address in its network; 127.0.0.2 where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.2"


def test_whom_a_round_waits_for_is_shown_until_it_begins(tmp_path: Path) -> None:
    log = events.Events(tmp_path / "rounds")
    log.add("waiting", clinics=["north"], needed=2, seconds=25)
    told = "Waiting for clinics: 2 are needed, north is there; for at most 25 s more."
    assert status.read(tmp_path).waiting == told and told in status_cli.text(status.read(tmp_path))
    log.add("waiting", clinics=["north"], needed=2, seconds=72 * 3600)
    end = datetime.datetime.now() + datetime.timedelta(hours=72)
    assert f"north is there; until {end:%a %d %b %H:}" in status.read(tmp_path).waiting
    log.add("round", round=1, factor="B", clinics=["north", "south"])
    assert status.read(tmp_path).waiting == ""
