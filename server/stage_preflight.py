"""Before a stage loads anything large: are the pictures there, does the disk suffice, does the memory, what licence.

Every fault is told at once. The estimates can be overruled in the recipe's [preflight], since they can be wrong.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from model.conversations import Conversation, Report
from server.stage_engine import GIB, Choice, Shape, fits
from server.stage_log import StageStopped
from server.stage_recipe import StageRecipe

_NAMED = 3  # examples of a fault that are named


def inspect(
    recipe: StageRecipe, rows: Sequence[Conversation], report: Report, shape: Shape, choice: Choice,
    memory: int | None, out: Path, start: Path, world: int,
) -> list[str]:  # fmt: skip
    """What to tell the user, line by line. Raises StageStopped with every fault when something stands in the way."""
    notes, faults = [report.sentence(), choice.reason, licence(start)], []
    if recipe.preflight.images:
        faults += missing_images(rows)
    needed, free = disk_bytes(shape, recipe, world), shutil.disk_usage(_existing(out)).free
    notes.append(f"Disk: {needed / GIB:.1f} GiB for checkpoints and weights, {free / GIB:.1f} GiB free at {out}.")
    if recipe.preflight.disk and needed > free:
        faults.append(
            f"{needed / GIB:.1f} GiB of disk are needed and {free / GIB:.1f} are free; choose another --out or lower "
            "checkpoint.keep (preflight.disk=false goes on anyway)"
        )
    if recipe.preflight.memory and not fits(choice, memory):
        faults.append(
            f"{choice.reason.rstrip('.')}; lower optim.batch and raise optim.accumulation, train less "
            "(stage.trainable) or set engine.offload=true (preflight.memory=false goes on anyway)"
        )
    if faults:
        raise StageStopped("Nothing was started: " + "; ".join(faults) + ".")
    return notes


def missing_images(rows: Sequence[Conversation]) -> list[str]:
    """One fault that counts and names the picture files that are not there; each file is looked at once."""
    names = sorted({row.image for row in rows if row.image is not None})
    lost = [name for name in names if not os.path.isfile(name)]
    if not lost:
        return []
    shown = ", ".join(lost[:_NAMED])
    return [
        f"{len(lost)} of {len(names)} pictures are missing, such as {shown}; give their folder with --images, "
        "or leave their rows out (`afya-server data check` lists them)"
    ]


def disk_bytes(shape: Shape, recipe: StageRecipe, world: int) -> int:
    """Bytes of the kept checkpoints, one more while it is written, and the final weights, over all processes."""
    width = 2 if recipe.engine.precision == "bf16" else 4
    checkpoint = width * shape.parameters + 12 * shape.trained
    return int((recipe.checkpoint.keep + 1) * checkpoint + width * shape.parameters * (world > 0))


def licence(start: Path) -> str:
    """What is known of the start model's licence, in one sentence."""
    for name in ("import.json", "afya.json"):
        try:
            known = json.loads((start / name).read_text(encoding="utf-8")).get("licence")
        except (OSError, ValueError, AttributeError):
            continue
        if known:
            return f"Licence of the start model: {known}; the trained model stays under it, and under the data's."
    return "The start model's folder names no licence; make sure that its terms and the data's allow your use."


def _existing(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
