"""A clinic's home for tests: consented samples on disk, the tiny base, limits, and messages as a server sends them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from PIL import Image

from model import adapters, wire
from model.data import Sample
from model.llava import base_sha256


def fill(home: Path, samples: Sequence[Sample], base: Path, limits: str = "") -> Path:
    """Write `samples` into the home's training folder as the kiosk does, and an afya.toml with `limits`."""
    folder = home / "training"
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    home.chmod(0o700)
    for number, sample in enumerate(samples):
        name = f"{sample.group.replace('/', '-')}.png"
        if not (folder / "images" / name).exists():
            Image.fromarray(sample.image).save(folder / "images" / name)
        row = {"id": f"{number:04d}", "image": name, "question": sample.question, "answer": sample.answer}
        row |= {"answer_type": sample.answer_type, "group": sample.group, "source": "kiosk"}
        (folder / "samples" / f"{number:04d}.json").write_text(json.dumps(row))
    if "min_cases" not in limits:
        limits += "\nmin_cases = 1"  # the tests' clinics have few pictures with many questions each
    (home / "afya.toml").write_text(f"model = {json.dumps(str(base))}\n[client]\n{limits}\n")
    return home


def request(base: Path, state: adapters.State, **changes: Any) -> RecordDict:
    """A train message's content; `changes` override entries of its configuration (None removes one)."""
    config = {
        "server-round": 1,
        "factor": "B",
        "base-sha256": base_sha256(base),
        "alpha": 8.0,
        "layout": wire.layout(adapters.spec_of(state, 8.0, base_sha256(base))),
        "local-steps": 8,
        "lr": 2e-3,
        "batch-size": 4,
        "seed": 0,
        "lr-ratio": 2.0,
        "proximal-mu": 0.0,
    }
    config |= {name.replace("_", "-"): value for name, value in changes.items()}
    kept = {name: value for name, value in config.items() if value is not None}
    arrays = ArrayRecord({wire.key(factor): Array(wire.pack(state, factor)) for factor in wire.FACTORS})
    return RecordDict({"arrays": arrays, "config": ConfigRecord(kept)})
