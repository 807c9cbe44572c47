"""The demo's three clinics: what each has to train on and its sealed test set, apart by image.

`phantom_clinics` draws synthetic pictures of scanners the reference model has never seen; `slake_clinics` splits SLAKE
by modality on images that the base was not trained on. Not here: how cases get into a clinic's kiosk (`cases`).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model import data, images, phantoms
from model.data import Sample
from scripts.demo_parts.plan import DemoFailed, Plan

MODALITIES = {"ct": "CT", "mri": "MRI", "xray": "X-Ray"}  # clinic of SLAKE -> SLAKE's name of the modality


@dataclass(frozen=True)
class ClinicData:
    """One clinic: `train` becomes reviewed and consented cases, `sealed` is asked at the end and never trained on."""

    name: str
    note: str
    train: list[Sample]
    sealed: list[Sample]


def make(plan: Plan) -> tuple[list[ClinicData], list[str]]:
    """The clinics of this run and remarks on the data for the report. Raises DemoFailed, DataError."""
    made, remarks = (phantom_clinics(plan), []) if plan.data is None else slake_clinics(plan)
    for clinic in made:
        overlap = {s.group for s in clinic.train} & {s.group for s in clinic.sealed}
        if overlap or not clinic.train or not clinic.sealed:
            raise DemoFailed(f"Clinic {clinic.name} has no training or no sealed pictures, or they overlap.")
    return made, remarks


def phantom_clinics(plan: Plan) -> list[ClinicData]:
    """Synthetic clinics of `phantoms.CLINICS`."""
    found = []
    for number, (name, clinic) in enumerate(phantoms.CLINICS.items()):
        shares = sorted(clinic.scanners.items(), key=lambda item: -item[1])
        note = ", ".join(f"{round(100 * share)} % {look.replace('_', ' ')}" for look, share in shares)
        train = phantoms.clinic_samples(name, plan.train_images, plan.train_seed + number, plan.size)
        sealed = phantoms.clinic_samples(name, plan.sealed_images, plan.sealed_seed + number, plan.size)
        found.append(ClinicData(name, note, train, sealed))
    return found


def slake_clinics(plan: Plan) -> tuple[list[ClinicData], list[str]]:
    """SLAKE by modality: training on en_train images held out from the base, sealed sets from en_validate."""
    assert plan.data is not None
    held, sealed = held_out_rows(plan.base, plan.data)
    remarks = _held_out(plan.base)[2]
    found = []
    for name, modality in MODALITIES.items():
        mine = [row for row in held if row.meta.get("modality") == modality]
        test = [row for row in sealed if row.meta.get("modality") == modality]
        count = len({row.group for row in mine})
        found.append(ClinicData(name, f"{modality}: {count} images of SLAKE the base has not seen", mine, test))
    return found, remarks


def held_out_rows(base: Path, folder: Path) -> tuple[list[Sample], list[Sample]]:
    """Rows of SLAKE's en_train on images that `base` was not trained on, and the rows of en_validate."""
    fraction, seed, _ = _held_out(base)
    rows = data.read(folder / "en_train.json", folder / "imgs")
    sealed = data.read(folder / "en_validate.json", folder / "imgs")
    hidden = {row.group for row in sealed}
    _, held = data.split_by_group([row for row in rows if row.group not in hidden], fraction, seed)
    return held, sealed


def _held_out(base: Path) -> tuple[float, int, list[str]]:
    """Which images the base was not trained on (share and seed of the split), from its own training record."""
    try:
        record = json.loads((base / "training.json").read_text(encoding="utf-8"))
        fraction, seed = float(record["data"]["hold_out"]), int(record["data"]["hold_out_seed"])
        taught = bool(record.get("teachers"))
    except (OSError, ValueError, KeyError, TypeError):
        remark = f"{base.name} has no training.json: that it has not seen these images (half, seed 7) is unproven."
        return 0.5, 7, [remark]
    if fraction <= 0:
        raise DemoFailed(
            f"{base} was trained on all of SLAKE's en_train, so no image is new to it; make a base that has not seen"
            " most of them (afya-server train ... --set data.hold_out=0.9) and give it with --base."
        )
    return fraction, seed, [f"{base.name} had teachers; whether they saw these images is unproven."] if taught else []


def write_rows(folder: Path, samples: Sequence[Sample]) -> Path:
    """Write samples as LLaVA JSON with PNG pictures, for a job to read; returns the JSON file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, names = [], {}
    for sample in samples:
        if sample.group not in names:
            png = images.to_png(data.load_rgb(sample))
            names[sample.group] = f"{hashlib.sha256(png).hexdigest()}.png"
            (folder / "images" / names[sample.group]).write_bytes(png)
        turns = [{"from": "human", "value": sample.question}, {"from": "gpt", "value": sample.answer}]
        row = {"id": sample.id, "image": names[sample.group], "answer_type": sample.answer_type}
        rows.append({**row, "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
