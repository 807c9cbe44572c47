"""Clinics that examine candidates, a run with them, and the passport that comes of it."""

from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from model import adapters, exam, passport
from model.exam import Marks
from server import checkpoint as store
from server import rounds, signing
from tests.server import fakes
from tests.server.fakes import Clock, FakeGrid, honest

Reply = RecordDict | Error | Exception | None


def counts(after: float, rows: int = 300, seed: int = 0) -> dict[str, Any]:
    """What a clinic counts: 70 % right with what is installed, `after` with the candidate."""
    draw = np.random.default_rng(seed)
    luck, groups = draw.random(rows), [f"p{number // 5}" for number in range(rows)]
    reliant = [True] * rows
    first = Marks(list(luck < 0.7), [0.7] * rows, reliant)
    second = Marks(list(luck < after), [min(after, 0.999)] * rows, reliant)
    return dict(exam.count(first, first, second, groups, 4).record())


class Clinics(FakeGrid):
    """Clinics that examine: `share` right answers of each candidate, by round."""

    def __init__(self, share: dict[int, float]) -> None:
        super().__init__({node: honest(0.01) for node in (1, 2, 3)})
        self.share = share
        self.round = 0

    def examined(self, node: int, message: Message) -> Reply:
        digest = str(message.content.config_records["config"]["sha256"])
        self.round = int(message.metadata.group_id)
        found = counts(self.share.get(self.round, 0.8), seed=node)
        return RecordDict({"counts": MetricRecord(found), "config": ConfigRecord({"sha256": digest})})

    def kinds(self) -> list[str]:
        return [message.metadata.message_type for message in self.sent]


def run(tmp_path: Path, tiny: Path, grid: FakeGrid, **values: object) -> store.RoundCheckpoint:
    key = signing.signing_key(tmp_path / "certs")
    chosen = fakes.settings(tmp_path / "rounds", tiny, signing_key=str(key), **values)
    clock = Clock()
    return rounds.federate(grid, chosen, sleep=clock.sleep, clock=clock)


def record(tmp_path: Path, number: int) -> dict[str, Any]:
    """The verified record of a release's passport."""
    folder = tmp_path / f"rounds/releases/round-{number:05d}"
    public = passport.public_key(tmp_path / "certs" / passport.PUBLIC)
    spec = adapters.spec(folder)
    return passport.verify((folder / passport.FILE).read_text(), public, adapters.sha256(folder), spec.base_sha256)
