"""Train and test files in LLaVA format from the official VQA-RAD, SLAKE and PathVQA, by official split or by image.

Writes {dataset}_{split}.json, train_all.json with the training rows of all datasets, and build.json with the counts.
Image names are relative to one folder. Rows without an answer or without their picture are left out and counted.
"""

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model import files
from model.data import DataError, Sample, split_by_group
from server import data_sources
from server.data_sources import SPLITS, Splits

PREFIX = {"slake": "slake", "vqa_rad": "vqarad", "path_vqa": "pathvqa"}  # of row ids
_KEPT_META = ("modality", "location", "q_lang")


@dataclass(frozen=True)
class Plan:
    """What to build: the releases given, the folder that all image names are relative to, and how to split.

    `split_by_image` is None for the official split, else the fraction of the pictures that becomes the test part:
    then all official splits of all datasets are pooled and no picture, by its bytes, is on both sides.
    """

    images: Path
    slake: Path | None = None
    vqa_rad: Path | None = None
    path_vqa: Path | None = None
    language: str = "en"
    split_by_image: float | None = None
    seed: int = 0


@dataclass
class Built:
    """What was written: rows by dataset and split as counts, what was left out, and pictures on both sides."""

    files: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    shared_images: dict[str, int] = field(default_factory=dict)
    split: str = "official"


def build(plan: Plan, out: Path) -> Built:
    """Read the releases, split them and write the files into `out`. Raises `DataError`."""
    if plan.split_by_image is not None and not 0 < plan.split_by_image < 1:
        raise DataError(f"A test part of {plan.split_by_image} is none; give a fraction between 0 and 1.")
    datasets = _read(plan)
    if not datasets:
        raise DataError("Nothing to build: give at least one of --slake, --vqa-rad and --path-vqa.")
    built = Built()
    hashes: dict[Path, str] = {}
    left_out: Counter[str] = Counter()
    for name, parts in datasets.items():
        datasets[name] = {split: _usable(rows, name, hashes, left_out) for split, rows in parts.items()}
    if plan.split_by_image is not None:
        built.split = f"by image: {plan.split_by_image:g} for test, seed {plan.seed}"
        datasets = _by_image(datasets, plan.split_by_image, plan.seed)
    built.left_out = dict(left_out)
    _write(datasets, plan, out, built)
    return built


def _read(plan: Plan) -> dict[str, Splits]:
    datasets: dict[str, Splits] = {}
    if plan.slake:
        datasets["slake"] = data_sources.slake(plan.slake, plan.language)
    if plan.vqa_rad:
        datasets["vqa_rad"] = data_sources.vqa_rad(plan.vqa_rad)
    if plan.path_vqa:
        datasets["path_vqa"] = data_sources.path_vqa(plan.path_vqa, plan.images)
    return datasets


def _usable(rows: list[Sample], name: str, hashes: dict[Path, str], left_out: Counter[str]) -> list[Sample]:
    """Rows with question, answer and picture; their `group` becomes the hash of the picture's file."""
    kept = []
    for row in rows:
        image = row.image
        assert isinstance(image, Path)
        if image not in hashes:
            hashes[image] = files.sha256_file(image) if image.is_file() else ""
        fault = "missing image" if not hashes[image] else "" if row.question and row.answer else "empty text"
        if fault:
            left_out[f"{name}: {fault}"] += 1
        else:
            kept.append(replace(row, group=hashes[image]))
    return kept


def _by_image(datasets: dict[str, Splits], fraction: float, seed: int) -> dict[str, Splits]:
    """The same rows in train and test alone, divided by picture over all datasets together."""
    pool = [replace(row, source=name) for name, parts in datasets.items() for rows in parts.values() for row in rows]
    train, test = split_by_group(pool, fraction, seed)
    return {
        name: {"train": [r for r in train if r.source == name], "test": [r for r in test if r.source == name]}
        for name in datasets
    }


def _write(datasets: dict[str, Splits], plan: Plan, out: Path, built: Built) -> None:
    out.mkdir(parents=True, exist_ok=True)
    everything: list[dict[str, Any]] = []
    for name, parts in datasets.items():
        used: Counter[str] = Counter()
        for split in SPLITS:
            if not (samples := parts.get(split)):
                continue
            rows = [llava_row(sample, PREFIX[name], plan.images, used) for sample in samples]
            if split == "train":
                everything += rows
            _save(out / f"{name}_{split}.json", rows, samples, built)
        built.shared_images[name] = _shared(parts)
    if everything:
        train = [sample for parts in datasets.values() for sample in parts.get("train", [])]
        _save(out / "train_all.json", everything, train, built)
    report = {"split": built.split, "language": plan.language, "files": built.files}
    report |= {"left_out": built.left_out, "images_in_train_and_test": built.shared_images}
    files.write_atomic(out / "build.json", json.dumps(report, indent=1).encode())


def _shared(parts: Splits) -> int:
    """Pictures, by their bytes, that both the training and the test part hold."""
    return len({row.group for row in parts.get("train", [])} & {row.group for row in parts.get("test", [])})


def _save(path: Path, rows: list[dict[str, Any]], samples: list[Sample], built: Built) -> None:
    files.write_atomic(path, json.dumps(rows, ensure_ascii=False, indent=0).encode())
    kinds = Counter(sample.answer_type for sample in samples)
    images = len({sample.group for sample in samples})
    counts = {"rows": len(rows), "images": images, "open": kinds["open"], "closed": kinds["closed"]}
    built.files[path.name] = counts | ({"unknown": kinds["unknown"]} if kinds["unknown"] else {})


def llava_row(sample: Sample, prefix: str, images: Path, used: Counter[str]) -> dict[str, Any]:
    """One row in LLaVA format; `used` counts the ids given so far, a repeated one gets a number behind it."""
    name = f"{prefix}_{sample.id}"
    used[name] += 1
    row: dict[str, Any] = {"id": name if used[name] == 1 else f"{name}-{used[name]}"}
    row["image"] = _relative(sample, images)
    if sample.answer_type != "unknown":
        row["answer_type"] = sample.answer_type.upper()
    if sample.meta.get("content_type"):
        row["question_type"] = sample.meta["content_type"]
    row["conversations"] = [
        {"from": "human", "value": f"<image>\n{sample.question}"},
        {"from": "gpt", "value": sample.answer},
    ]
    return row | {key: sample.meta[key] for key in _KEPT_META if sample.meta.get(key)}


def _relative(sample: Sample, images: Path) -> str:
    assert isinstance(sample.image, Path)
    try:
        return sample.image.resolve().relative_to(images.resolve()).as_posix()
    except ValueError as error:
        raise DataError(f"{sample.image} is not below {images}; give --images a folder above all pictures.") from error
