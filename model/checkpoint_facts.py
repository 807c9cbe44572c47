"""Where an imported model comes from, and the report of an import."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import presets
from model.checkpoint_source import read_json

FACTS, FETCHED = "import.json", "fetched.json"  # where a model comes from: beside an imported, a fetched one


@dataclass(frozen=True)
class ImportReport:
    """What was imported and how. `tower_weights` is "checkpoint" or "tower"; the comparison is None where only one was.

    `dropped` are keys of the source that no weight was made of, `notes` sentences for the person who imports.
    """

    out: Path
    source: str
    model_type: str
    template: str
    dtype: str
    parameters: int
    bytes: int
    image_tokens: int
    image_token_id: int
    tower: str
    tower_weights: str
    tower_compared: int | None
    tower_different: int | None
    tower_largest_difference: float | None
    merged: int
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return dataclasses.asdict(self) | {"out": str(self.out)}


def provenance(src: Path, base: Path | None, preset: str | None) -> dict[str, Any]:
    """Where a model comes from: named by the user, noted when it was fetched, or its folder's name.

    "preset" (a Preset or None), "template", "source", "revision", "licence". Raises PresetMissing, CheckpointError.
    """
    noted = read_json(src / FETCHED)
    known = presets.preset(preset or str(noted["preset"])) if preset or noted.get("preset") else None
    own = read_json(src / FACTS) or (read_json(base / FACTS) if base is not None else {})
    return {
        "preset": known,
        "template": known.template if known else own.get("template"),
        "source": noted.get("source") or (known.source if known else None) or own.get("source") or src.name,
        "revision": noted.get("revision") or (known.revision if known else None) or own.get("revision"),
        "licence": (known.licence if known else None) or own.get("licence"),
    }
