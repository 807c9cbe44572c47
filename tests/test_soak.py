"""The soak's schedule, report and table, its lies, and a real server that is killed; the rest is run by hand."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from scripts.federation import family
from scripts.soak_parts import impostors, main
from scripts.soak_parts.deployment import Deployment, NotSurvived, fingerprint
from scripts.soak_parts.lies import LIES, PASSING
from scripts.soak_parts.report import Outcome, Report, table
from scripts.soak_parts.schedule import FAULTS, KILLS, LINES, Case, moments, plan
from scripts.soak_parts.town import Town

ROOT = Path(__file__).resolve().parent.parent


def test_moments_spread_over_a_round_and_are_the_same_each_time() -> None:
    first = moments(20, 0, "superlink kill")
    assert first == moments(20, 0, "superlink kill") != moments(20, 1, "superlink kill")
    assert [int(share * 20) for share in first] == list(range(20))


def test_every_fault_is_planned_and_one_can_be_chosen() -> None:
    cases = plan(20, 0, (), main.lies(), main.tricks())
    assert [case.fault for case in cases if case.fault in KILLS] == [fault for fault in KILLS for _ in range(20)]
    assert len({case.key for case in cases}) == len(cases) == 5 * 20 + 5 * len(LINES) + len(LIES) + len(main.tricks())
    assert {case.fault for case in cases} == set(FAULTS) == set(main.faults())
    assert {case.fault for case in plan(2, 0, ("line",), (), ())} == {"line"}
    assert list(LIES)[-len(PASSING) :] == list(PASSING), "a lie that counts changes the rounds after it"


def test_a_report_goes_on_where_it_stopped_and_two_may_write_it(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    one, other = Report(path), Report(path)
    one.add("superlink: kill 01", "superlink", Outcome(True, "done again", 12.0, 1))
    other.add("line: cut 01", "cut", Outcome(False, "no reply"))
    later = Report(path)
    assert later.has("superlink: kill 01") and not later.has("line: cut 01") and not later.has("line: cut 02")
    assert later.failures() == ["line: cut 01: no reply"]
    later.add("line: cut 01", "cut", Outcome(True, "its reply counted", 3.0))
    later.add("line: cut 02", "cut", Outcome(True, "its reply counted", 5.0))
    again = Report(path)
    assert again.failures() == [] and again.cases["line: cut 01"]["failures"] == ["no reply"]
    rows = table(again, main.rows()).splitlines()
    assert rows[2] == "| kill -9 of the SuperLink | 1 | 1 | done again | 12 / 12 |"
    assert rows[3] == "| the line is cut | 2 | 2 | its reply counted | 4 / 5 |" and len(rows) == 4


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("[1, 2]")
    done = subprocess.run([ROOT / "scripts/soak", "--out", path, "--table"], capture_output=True, text=True)
    assert done.returncode == 1 and "is no report of a soak" in done.stderr
    assert path.read_text() == "[1, 2]"


def test_a_report_with_a_failure_ends_with_1_and_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    Report(path).add("server: kill 03", "server", Outcome(False, "the server did not start again"))
    done = subprocess.run([ROOT / "scripts/soak", "--out", path, "--table"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Not survived: server: kill 03: the server did not start again" in done.stderr


def test_cases_run_in_order_and_a_failed_one_does_not_end_the_soak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def do(town: Town, case: Case) -> Outcome:
        done.append(case.key)
        if case.number == 2:
            raise NotSurvived("it did not come back")
        return Outcome(True, "fine")

    monkeypatch.setattr(main, "faults", lambda: {"line": do})
    cases = [Case("line", "cut", number, 0.5) for number in (1, 2, 3)]
    report = Report(tmp_path / "soak.json")
    main.run(cases, report, tmp_path / "work", 0.0, lambda text: None)
    assert done == [case.key for case in cases] and report.failures() == ["line: cut 02: it did not come back"]
    main.run(cases, Report(tmp_path / "soak.json"), tmp_path / "work-2", 0.0, lambda text: None)
    assert done[3:] == ["line: cut 02"], "only what was not survived is done again"


def test_a_fingerprint_tells_any_change_of_what_a_clinic_holds(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training/a").write_bytes(b"1")
    first = fingerprint(tmp_path)
    (tmp_path / "privacy").mkdir()
    assert fingerprint(tmp_path) == first
    (tmp_path / "training/a").write_bytes(b"2")
    assert fingerprint(tmp_path) != first


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_another_reply_than_the_honest_one(name: str) -> None:
    def content(vector: np.ndarray, **metrics: int) -> RecordDict:
        records = {"arrays": ArrayRecord({"lora_A": Array(vector)}), "config": ConfigRecord({"server-round": 3})}
        return RecordDict(
            {**records, "metrics": MetricRecord({"num-examples": 12, "num-cases": 12, "server-round": 3})}
        )

    asked, honest = content(np.ones(8, np.float16)), content(np.full(8, 1.5, np.float16))
    if name == "a trainer that breaks":
        with pytest.raises(RuntimeError):
            LIES[name].tell(asked, honest)
        return
    told = LIES[name].tell(asked, honest)
    same = told.array_records == honest.array_records and told.metric_records == honest.metric_records
    assert not same and set(told) == {"arrays", "metrics"}


def test_a_killed_server_starts_again_and_leaves_no_process(tmp_path: Path) -> None:
    """The proxy dies, and with it all that it had started; an impostor is refused before and after."""
    with Deployment({}, (), {}, tmp_path / "out", tmp_path / "no-model") as now:
        rest = family(now.processes["server"].pid)
        assert impostors.TRICKS["the Control API"](now) == "all refused (403)"
        rest[0].kill()
        now.restart_server(rest[1:])
        assert impostors.TRICKS["the Control API"](now) == "all refused (403)"
        rest += family(now.processes["server"].pid)
    assert len(rest) >= 6 and not any(process.is_running() for process in rest)
