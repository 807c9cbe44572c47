"""From rounds to the kiosks: the adapter folder with its evidence, and the messages that bring it to each clinic.

The evidence says which rounds, who contributed, what was rejected and how the losses went. One message asks a clinic to
examine a candidate on its sealed set, another to install a release; a clinic checks both by itself. Not here: whether a
candidate is good enough (`server.candidate`) and the order of things (`server.publish`).
"""

import json
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict

from model import adapters, exam_counts, passport, wire
from model.exam_counts import Counts, CountsWrong
from model.files import write_atomic
from server.checkpoint import RoundCheckpoint
from server.strategy import plain

INSTALL, EXAMINE = MessageType.QUERY, MessageType.EVALUATE
FOLDER = "releases"
LAST_ROUNDS, LAST_ROWS = 20, 200  # of the evidence: it travels to every clinic, and rounds go on for years


def evidence(checkpoint: RoundCheckpoint) -> dict[str, Any]:
    """What is known about the adapter of a checkpoint, in plain values; of rounds and refusals the last ones."""
    rows = [row for row in checkpoint.history if row["changed"]]
    rejected = [{"round": row["round"], **entry} for row in checkpoint.history for entry in row["rejected"]]
    return {
        "round": checkpoint.round,
        "updates": checkpoint.updates,
        "base_sha256": checkpoint.spec.base_sha256,
        "rank": checkpoint.spec.rank,
        "alpha": checkpoint.spec.alpha,
        "contributed": sorted({entry["clinic"] for row in rows for entry in row["accepted"]}),
        "last_round": {"accepted": [{"clinic": row.clinic, "examples": row.examples} for row in checkpoint.accepted]},
        "rejected": rejected[-LAST_ROWS:],
        "rejected_in_all": len(rejected),
        "loss": [
            {"round": row["round"], "before": _mean(row, "loss-before"), "after": _mean(row, "loss-after")}
            for row in rows[-LAST_ROUNDS:]
        ],
    }


def _mean(row: dict[str, Any], key: str) -> float | None:
    """Weighted mean of one metric over the clinics of a round that sent it."""
    known = [(entry["weight"], entry["metrics"][key]) for entry in row["accepted"] if key in entry.get("metrics", {})]
    return sum(w * v for w, v in known) / sum(w for w, _ in known) if known else None


def build(root: Path, checkpoint: RoundCheckpoint, place: str = FOLDER) -> Path:
    """Write PLACE/round-NNNNN/ (PEFT folder and release.json) under `root`, rounded to what travels; returns it."""
    folder = root / place / f"round-{checkpoint.round:05d}"
    adapters.save(folder, wire.rounded(checkpoint.state), checkpoint.spec)
    record = {**evidence(checkpoint), "sha256": adapters.sha256(folder)}
    write_atomic(folder / adapters.RELEASE, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    return folder


def content(folder: Path) -> RecordDict:
    """The message that brings a release folder to a clinic, with its passport where it has one."""
    found = candidate(folder)
    extra = {"evidence": (folder / adapters.RELEASE).read_text(encoding="utf-8")}
    if (folder / passport.FILE).is_file():
        extra["passport"] = (folder / passport.FILE).read_text(encoding="utf-8")
    found.config_records["config"].update(extra)
    return found


def candidate(folder: Path) -> RecordDict:
    """The message that asks a clinic to examine an adapter folder: the adapter, its hash and its base, nothing else."""
    state, spec = adapters.load(folder)
    config = {
        "alpha": spec.alpha,
        "base-sha256": spec.base_sha256,
        "layout": wire.layout(spec),
        "sha256": adapters.sha256(folder),
    }
    arrays = ArrayRecord({wire.key(factor): Array(wire.pack(state, factor)) for factor in wire.FACTORS})
    return RecordDict({"arrays": arrays, "config": ConfigRecord(config)})


def counted(message: Any, digest: str) -> Counts | str:
    """The counts of a clinic that examined the candidate with this hash, or why there are none."""
    if message.has_error():
        return plain(f"failed: {message.error.reason or message.error.code}")
    for record in message.content.config_records.values():
        if "refused" in record:
            return plain(str(record["refused"]))
    records, configs = message.content.metric_records, message.content.config_records
    if set(records) != {"counts"} or set(configs) != {"config"} or len(message.content) != 2:
        return "the reply does not hold one record of counts"
    if str(configs["config"].get("sha256")) != digest:
        return "the reply is about another adapter"
    try:
        return exam_counts.read(records["counts"])
    except CountsWrong as error:
        return plain(f"the counts were not believed: {error}")


def verdict(message: Any) -> tuple[bool, str]:
    """Whether a clinic installed the release, and its words: the name it has there, or why not."""
    if message.has_error():
        return False, plain(f"failed: {message.error.reason or message.error.code}")
    for record in message.content.config_records.values():
        if "installed" in record:
            return True, plain(str(record["installed"]))
        if "refused" in record:
            return False, plain(str(record["refused"]))
    return False, "the reply says nothing about the release"
