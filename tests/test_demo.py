"""The demo's parts at a tiny size: cases through the kiosk, jobs in processes, figures, page; and what it refuses."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from kiosk import queries
from kiosk.store import CaseStore
from model import adapters, data, phantoms
from model.backends import Answer
from model.llava import base_sha256
from scripts import federation
from scripts.demo_parts import cases, clinics, flow, kiosk, main, measure, page
from scripts.demo_parts.job import Job
from scripts.demo_parts.plan import DemoFailed, Plan
from scripts.demo_parts.pool import MARK, end_marked, nothing_left_behind, run_jobs
from scripts.demo_parts.stages import Stages

REQUIRED = {"accuracy", "rounds", "bytes_per_round", "seconds", "peak_memory_mib", "answers"}


def plan_for(tmp_path: Path, base: Path, **changes: Any) -> Plan:
    """A plan of the tiniest size, with an output folder that exists."""
    small = {"rounds": 2, "local_steps": 8, "rank": 4, "batch": 8, "train_images": 3, "sealed_images": 2, "size": 32}
    plan = Plan(base, tmp_path / "out", kiosk_cases=2, **{**small, **changes})
    plan.work.mkdir(parents=True)
    return plan


def answer(text: str) -> Answer:
    return Answer(text, 0.5, None, 2, 0.1, 0.05, 1, "torch", "test", 4, "cpu", "tiny", "0" * 64, None, "stop")


@pytest.mark.slow
def test_the_parts_make_a_report_with_everything_it_must_hold(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tmp_path, tiny)
    spec_base = base_sha256(tiny)

    def run_local(homes: Any, out: Path, rounds: int, config: Any, base: Path, say: Any) -> federation.Result:
        state = adapters.initial(base, config["rank"], config["alpha"], config["targets"], config["seed"])
        adapters.save(out / "adapter", state, adapters.spec_of(state, config["alpha"], spec_base))
        for home in homes.values():
            assert data.read_training(home / "training")
            adapters.install(home, out / "adapter", evidence={"round": rounds})
        losses = [{"round": n, "clinic": c, "loss-before": 1.0, "loss-after": 0.5} for n in (1, 2) for c in homes]
        rejected = [{"round": 2, "clinic": "harbour", "reason": "late"}]
        given: dict[str, Any] = {"cpu_seconds": {}, "losses": losses, "events": [], "rejected": rejected}
        given |= {"installed": dict.fromkeys(homes, "round-0002"), "peak_memory_mib": {"server/proxy": 50.0}}
        return federation.Result([10, 10], 1.0, [0.5, 0.5], adapter=out / "adapter", **given)

    monkeypatch.setattr(federation, "run_local", run_local)
    with nothing_left_behind():
        report = flow.run(plan, Stages(6))
    saved = json.loads((plan.out / "report.json").read_text())
    assert saved == json.loads(json.dumps(report))
    assert set(saved) >= REQUIRED
    assert set(saved["accuracy"]) == {"reference", "local", "federated", "pooled"}
    assert len(saved["accuracy"]["local"]) == 3
    assert saved["rounds"] == 2
    assert saved["bytes_per_round"] == [10, 10]
    assert saved["seconds"]["total"] > 0
    assert {"demo", "server/proxy", "job pooled", "job reference"} <= set(saved["peak_memory_mib"])
    assert [a["picture"] for a in saved["answers"]] == ["CT_small.dcm"] * 2 + ["MR_small.dcm"] * 2
    assert all(isinstance(a["federated"]["answer"], str) for a in saved["answers"])
    assert saved["jobs"]["pooled"]["train"]["steps"] == 3 * plan.steps
    assert saved["jobs"]["local lakeside"]["train"]["steps"] == plan.steps
    assert saved["rejected"][0]["reason"] == "late"
    assert str(tmp_path) not in json.dumps(saved)
    # The untrained adapter has no effect yet: at the kiosk's own precision it answers as the base does.
    assert saved["accuracy"]["federated"] == saved["accuracy"]["reference"]
    the_page_stands_alone(plan.out / "index.html")
    home = kiosk.prepare(plan)
    assert adapters.current(home) is not None
    store = CaseStore(home / "kiosk.db")
    assert queries.counts(store).cases == 6
    store.close()


class _Links(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "data")]
        assert tag not in ("script", "link", "iframe")


def the_page_stands_alone(path: Path) -> None:
    html = path.read_text(encoding="utf-8")
    links = _Links()
    links.feed(html)
    assert links.found
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert html.count("<svg") == 3
    assert "late" in html


def test_a_clinics_cases_go_through_the_consent_gate(tmp_path: Path, tiny: Path) -> None:
    plan = plan_for(tmp_path, tiny)
    rows = phantoms.clinic_samples("lakeside", 2, seed=1, size=32)
    answers = {row.id: answer(row.answer if number % 2 else "wrong") for number, row in enumerate(rows)}
    home = tmp_path / "home"
    cases.open_home(home, "lakeside", plan)
    filled = cases.fill(home, rows, answers)
    assert (filled.cases, filled.asked) == (2, len(rows))
    assert filled.corrected == sum(number % 2 == 0 for number in range(len(rows)))
    assert filled.samples == len(rows)
    known = sorted((row.question, row.answer) for row in rows)
    assert sorted((s.question, s.answer) for s in data.read_training(home / "training")) == known


def test_sealed_pictures_are_never_trained_on(tmp_path: Path, tiny: Path) -> None:
    made, remarks = clinics.make(plan_for(tmp_path, tiny, train_images=20, sealed_images=20))
    assert not remarks
    assert [clinic.name for clinic in made] == list(phantoms.CLINICS)
    train = {np.asarray(s.image).tobytes() for clinic in made for s in clinic.train}
    sealed = {np.asarray(s.image).tobytes() for clinic in made for s in clinic.sealed}
    assert not train & sealed


def test_slake_clinics_hold_images_the_base_has_not_seen(tmp_path: Path, shared: Path, tiny: Path) -> None:
    slake = shared / "data" / "slake"
    made, remarks = clinics.make(plan_for(tmp_path, tiny, data=slake))
    assert remarks  # the tiny base has no record of its training
    seen, _ = data.split_by_group(data.read(slake / "en_train.json", slake / "imgs"), 0.5, 7)
    groups = {sample.group for sample in seen}
    assert [clinic.name for clinic in made] == ["ct", "mri", "xray"]
    for clinic in made:
        assert not {s.group for s in clinic.train} & groups
        assert {s.meta["modality"] for s in clinic.sealed} == {clinics.MODALITIES[clinic.name]}


def test_a_base_that_has_seen_every_image_is_refused(tmp_path: Path) -> None:
    record = {"data": {"hold_out": 0.0, "hold_out_seed": 7}}
    (tmp_path / "training.json").write_text(json.dumps(record))
    with pytest.raises(DemoFailed, match=r"no image is new to it.*--base"):
        clinics._held_out(tmp_path)


def test_real_images_start_from_the_model_that_has_seen_a_tenth_of_them(shared: Path, tmp_path: Path) -> None:
    assert main.parse(["--out", str(tmp_path)]).base.name == "reference"
    plan = main.parse(["--data", str(shared / "data/slake"), "--out", str(tmp_path)])
    assert plan.base.name == "reference_few"
    assert clinics._held_out(plan.base) == (0.9, 7, [])


def test_a_base_with_teachers_is_not_trusted_blindly(tmp_path: Path) -> None:
    record = {"data": {"hold_out": 0.5, "hold_out_seed": 7}, "teachers": ["runs/t1/model"]}
    (tmp_path / "training.json").write_text(json.dumps(record))
    assert "had teachers" in clinics._held_out(tmp_path)[2][0]


def test_written_rows_are_read_back_alike(tmp_path: Path) -> None:
    rows = phantoms.clinic_samples("hilltop", 2, seed=3, size=32)
    back = data.read(clinics.write_rows(tmp_path, rows))
    assert [(r.id, r.question, r.answer) for r in back] == [(r.id, r.question, r.answer) for r in rows]
    assert np.array_equal(data.load_rgb(back[0]), data.load_rgb(rows[0]))


def test_a_job_that_fails_names_its_log(tmp_path: Path) -> None:
    job = Job("lost", str(tmp_path / "job"), str(tmp_path / "nowhere"), 4, [str(tmp_path / "none.json")])
    with pytest.raises(DemoFailed, match=r"'lost' failed .*its log is .*log\.txt"):
        run_jobs([job], lambda share: None)


def test_nothing_that_carries_the_mark_outlives_the_run() -> None:
    with nothing_left_behind():
        command = [sys.executable, "-c", "print('up', flush=True); input()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(
            command, start_new_session=True, **pipes
        ) as sleeper:  # its own session: no signal of ours
            assert sleeper.stdout is not None
            assert sleeper.stdout.readline() == b"up\n"
            assert end_marked("another run") == 0
            assert end_marked(os.environ[MARK]) == 1
    assert not psutil.pid_exists(sleeper.pid)
    assert MARK not in os.environ


def test_a_folder_that_is_not_a_demos_is_left_alone(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    assert main.main(["--no-kiosk", "--base", str(tiny), "--out", str(out)]) == 1
    assert "was not made by a demo" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--data", "nowhere"], ["--base", "nowhere"], ["--what"]])
def test_a_wrong_command_line_is_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    assert ended.value.code == 2


def test_the_gain_is_measured_against_what_pooling_gains() -> None:
    found = {"reference": 40.0, "federated": 64.0, "pooled": 70.0, "local": []}
    assert measure.gain(found) == {"points": 24.0, "share_of_pooled_gain": 80.0}
    assert measure.gain({**found, "pooled": 40.0})["share_of_pooled_gain"] is None


def test_words_of_an_answer_cannot_shape_the_page() -> None:
    sample = phantoms.clinic_samples("harbour", 1, seed=2, size=32)[0]
    bad = {sample.id: {"text": "<script>alert(1)</script>"}}
    shown = page._picture(sample, {"reference": bad, "federated": bad})
    assert "<script" not in shown
    assert "&lt;script" in shown
