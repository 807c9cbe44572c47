"""The demo's stages in order, each a function: what it reads, what it starts, what it leaves for the report.

Not here: the command line and the output folder (`main`), figures (`measure`), the page (`page`).
"""

import re
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.trainer import TrainingFailed
from kiosk.store import StoreError
from model import adapters
from model.adapters import AdapterRejected
from model.backends import Answer
from model.data import DataError
from model.llava import ModelError
from scripts import federation
from scripts.demo_parts import cases, clinics, kiosk, measure, page
from scripts.demo_parts.clinics import ClinicData
from scripts.demo_parts.job import Job, peak_mib
from scripts.demo_parts.plan import DemoFailed, Plan
from scripts.demo_parts.pool import run_jobs
from scripts.demo_parts.stages import Bar, Stages, clock

ERRORS = (
    DemoFailed,
    federation.FederationFailed,
    TrainingFailed,
    StoreError,
    AdapterRejected,
    DataError,
    ModelError,
    OSError,
    subprocess.SubprocessError,
)
PICTURES = (("CT_small.dcm", "What modality is used to take this image?"),
            ("CT_small.dcm", "Which part of the body does this image belong to?"),
            ("MR_small.dcm", "What modality is used to take this image?"),
            ("MR_small.dcm", "Which part of the body does this image belong to?"))  # fmt: skip


@dataclass
class Found:
    """What the stages found out so far."""

    plan: Plan
    clinics: list[ClinicData]
    remarks: list[str]
    rows: dict[str, Path] = field(default_factory=dict)  # sealed rows of each clinic, for the jobs
    filled: dict[str, cases.Filled] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # by job
    federated: federation.Result | None = None

    def home(self, clinic: str) -> Path:
        """A clinic's $AFYA_HOME."""
        return self.plan.work / "clinics" / clinic

    def folder(self, job: str) -> Path:
        """Where a job's files lie."""
        return self.plan.work / "jobs" / job.replace(" ", "-")


def run(plan: Plan, stages: Stages) -> dict[str, Any]:
    """All stages but the kiosk; returns the report, which is written. Raises one of `ERRORS`."""
    with stages.stage("pictures", "Drawing pictures of three clinics, sealed test sets apart"):
        found = Found(plan, *clinics.make(plan))
        for clinic in found.clinics:
            found.rows[clinic.name] = clinics.write_rows(plan.work / "sealed" / clinic.name, clinic.sealed)
    with stages.stage("cases", "The reference model answers; the clinics' staff review, correct, consent") as bar:
        make_cases(found, bar)
    with stages.stage("federation", f"{plan.rounds} federated rounds of {plan.local_steps} steps, over TLS") as bar:
        federate(found, bar)
    with stages.stage("comparison", "For comparison: each clinic alone, and all data pooled") as bar:
        compare(found, bar)
    with stages.stage("scores", "Scoring the sealed sets"):
        report = figures(found, stages)
    with stages.stage("report", "Writing the report"):
        measure_end(report, stages)
        measure.save(plan.out / "report.json", report)
        page.write(plan.out / "index.html", report, found.clinics, {n: answers(found, n) for n in found.results})
    return report


def make_cases(found: Found, bar: Bar) -> None:
    """Let the reference answer everything, then fill each clinic's kiosk with reviewed, consented cases."""
    plan = found.plan
    staged = {c.name: clinics.write_rows(plan.work / "asked" / c.name, c.train) for c in found.clinics}
    jobs = [_job(found, f"asked {name}", rows=[path]) for name, path in staged.items()]
    sealed = _job(found, measure.REFERENCE, pictures=_pictures())
    results = run_jobs([sealed, *jobs], lambda share: bar.at(0.8 * share))
    found.results[measure.REFERENCE] = results[measure.REFERENCE]
    for number, clinic in enumerate(found.clinics):
        given = {key: Answer(**value) for key, value in answers(found, f"asked {clinic.name}").items()}
        cases.open_home(found.home(clinic.name), clinic.name, plan)
        done = found.filled[clinic.name] = cases.fill(found.home(clinic.name), clinic.train, given)
        bar.at(0.8 + 0.2 * (number + 1) / len(found.clinics))
        bar.line(f"{clinic.name}: {done.cases} cases, {done.corrected} of {done.asked} answers corrected")


def _job(found: Found, name: str, rows: Sequence[Path] = (), **more: Any) -> Job:
    plan = found.plan
    paths = [str(path) for path in rows or found.rows.values()]
    return Job(name, str(found.folder(name)), str(plan.base), plan.bits, paths, **more)


def _pictures() -> list[list[str]]:
    from pydicom.data import get_testdata_file

    return [[str(get_testdata_file(name, download=False)), question] for name, question in PICTURES]


def answers(found: Found, job: str) -> dict[str, dict[str, Any]]:
    """What a job answered, by sample id."""
    return measure.answers_of(found.folder(job))


def federate(found: Found, bar: Bar) -> None:
    """Run the federation on loopback; its adapter ends up installed in every clinic's home."""
    plan = found.plan
    config = {"targets": plan.targets, "rank": plan.rank, "alpha": plan.alpha, "local-steps": plan.local_steps}
    config |= {"lr": plan.lr, "batch-size": plan.batch, "seed": plan.adapter_seed}
    homes = {clinic.name: found.home(clinic.name) for clinic in found.clinics}
    out = plan.work / "federation"
    end = threading.Event()
    watch = threading.Thread(target=_watch, args=(out, homes, plan.rounds, bar, end), daemon=True)
    watch.start()
    try:
        found.federated = federation.run_local(homes, out, plan.rounds, config, plan.base, bar.line)
    finally:
        end.set()
        watch.join()


def _watch(out: Path, homes: Mapping[str, Path], rounds: int, bar: Bar, end: threading.Event) -> None:
    """Progress of the rounds, from the steps in the clinics' own logs."""
    while not end.wait(0.5):
        share = 0.0
        for name in homes:
            log = out / f"{name}.log"
            steps = re.findall(rb"step (\d+)/(\d+) loss", log.read_bytes()) if log.exists() else []
            whole = sum(done == total for done, total in steps)
            part = int(steps[-1][0]) / int(steps[-1][1]) if steps and steps[-1][0] != steps[-1][1] else 0.0
            share += (whole + part) / (rounds * len(homes))
        bar.at(min(1.0, share))


def compare(found: Found, bar: Bar) -> None:
    """Train each clinic alone and all data together; these and the federated adapter answer the sealed sets."""
    assert found.federated is not None
    names = [clinic.name for clinic in found.clinics]
    folders = [str(found.home(name) / "training") for name in names]
    settings = found.plan.to_dict()
    together = {**settings, "steps": found.plan.steps * len(names)}  # as many as the clinics take between them
    jobs = [_job(found, measure.POOLED, train=folders, settings=together)]
    for name, folder in zip(names, folders, strict=True):
        jobs.append(_job(found, measure.local(name), train=[folder], settings=settings))
    adapter = str(found.federated.adapter)
    jobs.append(_job(found, measure.FEDERATED, adapter=adapter, pictures=_pictures()))
    found.results |= run_jobs(jobs, bar.at)


def figures(found: Found, stages: Stages) -> dict[str, Any]:
    """The report as plain values, the required entries first."""
    plan, fed = found.plan, found.federated
    assert fed is not None
    scored = {name: measure.scores(found.clinics, answers(found, name)) for name in found.results}
    names = [clinic.name for clinic in found.clinics]
    accuracy = measure.accuracy(scored, names)
    before, after = answers(found, measure.REFERENCE), answers(found, measure.FEDERATED)
    peaks = {"demo": round(peak_mib(), 1), **fed.peak_memory_mib}
    peaks |= {f"job {name}": result["peak_memory_mib"] for name, result in found.results.items()}
    reference = found.results[measure.REFERENCE]
    return {
        "accuracy": accuracy,
        "rounds": plan.rounds,
        "bytes_per_round": fed.bytes_per_round,
        "seconds": {},
        "peak_memory_mib": peaks,
        "answers": dicom_answers(found),
        "gain": measure.gain(accuracy),
        "difference": measure.difference(found.clinics, before, after),
        "scores": scored,
        "clinics": measure.clinic_table(found.clinics, found.filled),
        "federation": {"round_seconds": fed.round_seconds, "losses": fed.losses, "installed": fed.installed},
        "rejected": fed.rejected,
        "jobs": {name: {k: v for k, v in result.items() if k != "pictures"} for name, result in found.results.items()},
        "sha256": {"base": reference["base_sha256"], "federated_adapter": adapters.sha256(fed.adapter)},
        "measured": measure.how_measured(plan, reference["reason"]),
        "remarks": found.remarks,
        "limits": [*(measure.DRAWINGS if plan.data is None else ()), *measure.LIMITS],
    }


def dicom_answers(found: Found) -> list[dict[str, Any]]:
    """The questions about pydicom's CT and MR with the reference's and the federated answer."""
    pairs = zip(found.results[measure.REFERENCE]["pictures"], found.results[measure.FEDERATED]["pictures"], strict=True)
    return [
        {
            "picture": before["picture"],
            "question": before["question"],
            "reference": {"answer": before["answer"], "confidence": before["confidence"]},
            "federated": {"answer": after["answer"], "confidence": after["confidence"]},
        }
        for before, after in pairs
    ]


def measure_end(report: dict[str, Any], stages: Stages) -> None:
    """Put the times into the report, as late as possible."""
    report["seconds"] = {"total": stages.total_seconds(), **stages.seconds}


def summary(report: Mapping[str, Any]) -> list[str]:
    """The figures as lines for a terminal."""
    gain = report["gain"]
    lines = [f"Right answers on the sealed sets, at {report['measured']['bits']} bits, in percent:"]
    for name, one in report["scores"].items():
        low, high = one["all"]["low"], one["all"]["high"]
        lines.append(f"  {name:20} {one['all']['percent']:5.1f}  [{low:.1f}, {high:.1f}]")
    share = gain["share_of_pooled_gain"]
    of = f"{share} % of what pooling gains" if share is not None else "where pooling gains less than a point"
    lines.append(f"Together: {gain['points']:+.1f} points over the reference, {of}.")
    size = sum(report["bytes_per_round"]) / len(report["bytes_per_round"]) / 1e6
    lines.append(f"{report['rounds']} rounds of {size:.1f} MB; no image left a clinic's folder.")
    return [*lines, *report["remarks"]]


def serve(plan: Plan, stages: Stages) -> None:
    """Open the kiosk with some of the cases and the federated adapter until Ctrl-C."""
    with stages.stage("kiosk", "The kiosk, with these cases and the federated adapter"):
        home, port = kiosk.prepare(plan), kiosk.free_port()
        code = kiosk.run(home, port)
    if code not in (0, 130, -2):
        raise DemoFailed(f"The kiosk ended with code {code} after {clock(stages.seconds['kiosk'])}.")
