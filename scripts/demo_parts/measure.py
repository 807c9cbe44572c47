"""From answers to figures: strict scores with intervals, per clinic and on the union, and what report.json holds.

`accuracy` is strict exact match in percent over the union of the sealed sets. Not here: the page (`page`).
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model import evaluate, files, metrics
from scripts.demo_parts.clinics import ClinicData
from scripts.demo_parts.plan import TUNING_SEED, Plan

REFERENCE, FEDERATED, POOLED = "reference", "federated", "pooled"
PACKAGES = ("afya", "torch", "transformers", "peft", "bitsandbytes", "flwr", "numpy", "pydicom", "streamlit")
DRAWINGS = (
    "The pictures are schematic drawings. Nothing learned from them says anything about patients.",
    "Most questions ask what is hidden by an unknown scanner: the modality and the part of the body. Sides, sizes and"
    " counts, which the reference model hardly tells on any drawing, stay as hard as they were (scores by topic:"
    " report.json).",
)
LIMITS = (
    "One run with one set of seeds. The intervals cover the choice of sealed pictures, not of seeds or clinics.",
    "All clinics run on one computer here, over loopback; real links are slower and break.",
    "The reviews are made from the known truth: no person judged these answers.",
    "The settings (rounds, steps, rank, learning rate, mixture of scanners) were chosen on pictures of other seeds,"
    " so that the effect shows in a few minutes.",
    "That no image leaves a clinic is not a full promise of privacy: adapters can leak something of what they were"
    " trained on. This run adds no noise.",
    "The pooled adapter needs all images in one place, and takes as many steps as the clinics take between them; a"
    " local one takes as many as its clinic does. Both train both factors at once. Training longer is not always"
    " better, so pooling is a yardstick, not a proven bound.",
    "Not for clinical use.",
)


def local(clinic: str) -> str:
    """Name of the adapter that one clinic trains alone."""
    return f"local {clinic}"


def answers_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What a job answered: sample id -> the fields of `Answer`."""
    return json.loads((folder / "answers.json").read_bytes())


def scores(clinics: Sequence[ClinicData], answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Strict scores of one set of answers: on the union, by clinic, by topic. Percent, 95 % intervals over images."""
    union = metrics.score(_rows(list(clinics), answers), resamples=4000)
    by_clinic = {clinic.name: _plain(metrics.score(_rows([clinic], answers), resamples=4000).all) for clinic in clinics}
    kinds = {"closed": _plain(union.closed), "open": _plain(union.open)}
    topics = {name: _plain(found) for name, found in union.by_topic.items()}
    return {"all": _plain(union.all), **kinds, "by_clinic": by_clinic, "by_topic": topics}


def difference(
    clinics: Sequence[ClinicData], before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Percentage points after - before on the same questions, with its interval over images."""
    found = metrics.flips(_rows(list(clinics), before), _rows(list(clinics), after), resamples=4000)
    return {key: value for key, value in found.items() if not key.endswith("_ids")}


def _rows(clinics: list[ClinicData], answers: Mapping[str, Mapping[str, Any]]) -> list[metrics.Row]:
    samples = [sample for clinic in clinics for sample in clinic.sealed]
    return evaluate.rows(samples, [answers[s.id]["text"] if s.id in answers else None for s in samples])


def _plain(found: metrics.Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in asdict(found).items()}


def accuracy(scored: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The report's first figures: percent on the union of the sealed sets."""
    found = {name: one["all"]["percent"] for name, one in scored.items()}
    alone = [found[local(name)] for name in names]
    return {REFERENCE: found[REFERENCE], "local": alone, FEDERATED: found[FEDERATED], POOLED: found[POOLED]}


def gain(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """Points that federation gained over the reference, and its share of what pooling gained (percent).

    The share is None where pooling itself gains less than a point: a share of nothing means nothing.
    """
    points = figures[FEDERATED] - figures[REFERENCE]
    room = figures[POOLED] - figures[REFERENCE]
    return {"points": round(points, 2), "share_of_pooled_gain": round(100 * points / room, 1) if room >= 1 else None}


def how_measured(plan: Plan, reason: str) -> dict[str, Any]:
    """What a reader needs to repeat the figures: rule, settings, seeds, versions, machine."""
    return {
        "accuracy": "strict exact match after normalisation, percent, on the union of the clinics' sealed sets;"
        " greedy decoding; 95 % bootstrap intervals, whole images drawn (4000 times)",
        "bits": plan.bits,
        "backend": reason,
        "bytes_per_round": "factor values sent down to all clinics and up from them, without TLS and HTTP framing",
        "peak_memory_mib": "largest resident memory: of federation processes sampled every 0.25 s, of jobs by the"
        " system's own count",
        "seconds": "wall time by stage; cpu_seconds: processor time of the jobs",
        "settings": plan.to_dict(),
        "settings_chosen_on": f"clinics drawn with seeds around {TUNING_SEED}, never these",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "processor": platform.machine()},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def clinic_table(clinics: Sequence[ClinicData], filled: Mapping[str, Any]) -> dict[str, Any]:
    """What each clinic had: pictures and questions for training and sealed, and what its staff corrected."""
    table = {}
    for clinic in clinics:
        images = {"train": len({s.group for s in clinic.train}), "sealed": len({s.group for s in clinic.sealed})}
        questions = {"train": len(clinic.train), "sealed": len(clinic.sealed)}
        held = {"note": clinic.note, "images": images, "questions": questions}
        table[clinic.name] = {**held, **asdict(filled[clinic.name])}
    return table


def save(path: Path, report: Mapping[str, Any]) -> None:
    """Write report.json, the old one or the new one, never half."""
    files.write_atomic(path, (json.dumps(report, indent=1) + "\n").encode())
