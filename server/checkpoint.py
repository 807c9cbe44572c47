"""Round checkpoints: what the federation knows after each round, written so that any crash leaves a sound one.

A checkpoint is a folder round-00003/ with the factors and, written last, manifest.json with the hash of everything.
`latest` verifies before it believes and falls back to the one before. Not here: copies on another disk.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from model import adapters
from model.files import sync_folder, write_atomic

MANIFEST = "manifest.json"
KEEP = 5  # checkpoints kept: enough to step back from a bad round, little enough for a small disk
WHOLE = 100  # rounds of the history that are kept in full; of those before, who took part and whose reply was refused
_FOLDER = re.compile(r"round-(\d{5})")


class CheckpointDamaged(ValueError):
    """A checkpoint is not what was written; the message says which file and why."""


@dataclass(frozen=True)
class Rejection:
    """One reply that did not count, and the reason in plain words."""

    clinic: str
    reason: str


@dataclass(frozen=True)
class Contribution:
    """One reply that counted: `weight` is its share of the mean, `norm` that of its update, `bytes` of its arrays.

    `cases` counts its patients, or pictures where patients are not known; 0 in rounds before that was kept.
    """

    clinic: str
    examples: int
    weight: float
    norm: float
    bytes: int
    metrics: dict[str, float] = field(default_factory=dict)
    cases: int = 0


@dataclass(frozen=True)
class RoundCheckpoint:
    """Everything after a round. `updates` counts the rounds that changed the factors; its parity decides A or B."""

    round: int
    updates: int
    factor: str
    changed: bool
    reason: str
    spec: adapters.AdapterSpec
    state: adapters.State
    accepted: tuple[Contribution, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    history: tuple[dict[str, Any], ...] = ()
    quality: dict[str, Any] = field(default_factory=dict)  # how exact the aggregation was: `server.aggregate.describe`


def save(root: Path, checkpoint: RoundCheckpoint, keep: int = KEEP) -> Path:
    """Write a checkpoint under a temporary name, flush, rename, then prune to the newest `keep`; returns its folder."""
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"round-{checkpoint.round:05d}"
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=root))
    try:
        adapters.save(partial, checkpoint.state, checkpoint.spec)
        write_atomic(partial / MANIFEST, _manifest(checkpoint, adapters.sha256(partial)))
        if final.exists():  # a damaged one of the same round: kept aside, a person may want to look at it
            os.rename(final, _aside(root, final.name))
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(root)
    _prune(root, keep)
    return final


def latest(root: Path) -> tuple[RoundCheckpoint | None, list[str]]:
    """The newest sound checkpoint, None where there is none at all, and a sentence for each newer one that was skipped.

    Raises CheckpointDamaged where there are some and none is sound: nobody wants to begin anew without knowing it.
    """
    skipped: list[str] = []
    for folder in _folders(root):
        try:
            return load(folder), [f"{fault} The round before it is used." for fault in skipped]
        except CheckpointDamaged as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointDamaged(
            f"{root} holds rounds and none of them can be read ({skipped[0]}) Put a copy back, or use another folder."
        )
    return None, skipped


def load(folder: Path) -> RoundCheckpoint:
    """Read and verify one checkpoint. Raises CheckpointDamaged with one plain sentence."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        claimed = manifest.pop("sha256")
        if _digest(manifest) != claimed:
            raise CheckpointDamaged(f"Checkpoint {folder.name}: {MANIFEST} was changed after it was written.")
        if adapters.sha256(folder) != manifest.pop("adapter_sha256"):
            raise CheckpointDamaged(f"Checkpoint {folder.name}: the factors are not the ones that were written.")
        state, spec = adapters.load(folder)
        manifest.pop("versions")
        accepted = tuple(Contribution(**row) for row in manifest.pop("accepted"))
        rejected = tuple(Rejection(**row) for row in manifest.pop("rejected"))
        history = tuple(manifest.pop("history"))
        found = RoundCheckpoint(
            spec=spec, state=state, accepted=accepted, rejected=rejected, history=history, **manifest
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointDamaged):
            raise
        raise CheckpointDamaged(f"Checkpoint {folder.name} is incomplete or damaged ({error}).") from error
    if folder.name != f"round-{found.round:05d}":
        raise CheckpointDamaged(f"Checkpoint {folder.name} is that of round {found.round}.")
    return found


def summary(checkpoint: RoundCheckpoint) -> dict[str, Any]:
    """The round in a few plain values: one row of the history and of what `afya-server rounds` prints."""
    return {
        "round": checkpoint.round,
        "factor": checkpoint.factor,
        "changed": checkpoint.changed,
        "reason": checkpoint.reason,
        "accepted": [asdict(row) for row in checkpoint.accepted],
        "rejected": [asdict(row) for row in checkpoint.rejected],
        "seconds": round(checkpoint.seconds, 2),
        "bytes_down": checkpoint.bytes_down,
        "bytes_up": checkpoint.bytes_up,
        "quality": {key: value for key, value in checkpoint.quality.items() if key != "layers"},
    }


def history(before: Sequence[dict[str, Any]], checkpoint: RoundCheckpoint) -> tuple[dict[str, Any], ...]:
    """The rows before with that of `checkpoint`; those of long ago in short, or every round would cost more."""
    old = len(before) - WHOLE + 1
    return (*(_short(row) for row in before[: max(0, old)]), *before[max(0, old) :], summary(checkpoint))


def _short(row: dict[str, Any]) -> dict[str, Any]:
    names = {key: [{"clinic": entry["clinic"]} for entry in row[key]] for key in ("accepted", "rejected")}
    return {"round": row["round"], "changed": row["changed"], **names}


def _manifest(checkpoint: RoundCheckpoint, adapter_sha256: str) -> bytes:
    record = {
        "round": checkpoint.round,
        "updates": checkpoint.updates,
        "factor": checkpoint.factor,
        "changed": checkpoint.changed,
        "reason": checkpoint.reason,
        "accepted": [asdict(row) for row in checkpoint.accepted],
        "rejected": [asdict(row) for row in checkpoint.rejected],
        "config": checkpoint.config,
        "seconds": checkpoint.seconds,
        "bytes_down": checkpoint.bytes_down,
        "bytes_up": checkpoint.bytes_up,
        "history": list(checkpoint.history),
        "quality": checkpoint.quality,
        "adapter_sha256": adapter_sha256,
        "versions": _versions(),
    }
    record["sha256"] = _digest(record)
    return (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _digest(record: dict[str, Any]) -> str:
    """Hash of a manifest's content, without the hash itself."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _versions() -> dict[str, str]:
    """Versions of what made the checkpoint; "not installed" where there is none."""
    found = {}
    for name in ("afya", "flwr", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _folders(root: Path) -> Iterator[Path]:
    """Checkpoint folders, newest round first; other names (partial, set aside) are never looked at."""
    if root.is_dir():
        yield from sorted((p for p in root.iterdir() if _FOLDER.fullmatch(p.name)), reverse=True)


def _aside(root: Path, name: str) -> Path:
    number = 1
    while (root / f"damaged-{name}-{number}").exists():
        number += 1
    return root / f"damaged-{name}-{number}"


def _prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted write left behind."""
    for folder in list(_folders(root))[keep:]:
        shutil.rmtree(folder)
    for partial in root.glob(".round-*.partial"):
        shutil.rmtree(partial)
