"""One case of `scripts/bench slake` in a process of its own: trains an adapter as asked and answers the test questions.

    python -m scripts.benches.slake_case CASE.json [--side-by-side]

The clinics' own trainer and the server's own aggregation, values rounded as on the wire, without the link between
them (`scripts/demo` has that). Writes what was answered right into the file that the case names.
"""

import hashlib
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.data import Sample
from server.aggregate import MODES

BATCH = 48  # questions answered together
LONGEST = 24  # tokens of an answer
MODALITY = {"ct": ("CT",), "mri": ("MRI",), "xray": ("X-Ray",)}
ORGAN = {
    "chest": ("Lung", "Chest_lung", "Chest_heart", "Chest_mediastinal"),
    "abdomen": ("Abdomen", "Pelvic Cavity"),
    "head": ("Brain", "Brain_Tissue", "Brain_Face", "Neck"),
}  # SLAKE's names of places in the body
SPLITS: dict[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "modality": ("modality", MODALITY),
    "organ": ("location", ORGAN),
}
CHANCE = ("one", "two", "three", "four", "five")  # clinics of the split "chance": alike, each has a fifth of the images


@dataclass(frozen=True)
class Case:
    """`what`: "none", "pooled", "brief", "local CLINIC" or an aggregation. `tune` tests on some of the training images.

    "pooled" and "brief" take as many steps as one clinic; the batch in its settings is that of all clinics, or of one.

    With `lie` in its settings the first clinic lies so (`slake_lies`); `cut` is that of the trimmed mean.
    """

    what: str
    split: str
    seed: int
    base: str
    data: str
    out: str
    settings: dict[str, Any] = field(default_factory=dict)
    tune: bool = False

    @property
    def name(self) -> str:
        """What it is called in the report and as a file."""
        if self.tune:
            s = self.settings
            return f"tune-{self.what}-{s['lr']:g}-{s['lr_ratio']:g}-{s['lr_final']:g}-{self.seed}"
        if self.what == "none":
            return "none"
        if self.what in ("pooled", "brief"):
            return f"{self.what}-{self.seed}"
        return f"{self.what}-{self.split}-{self.seed}".replace(" ", "-")


def rows(case: Case) -> tuple[list[Sample], list[Sample]]:
    """Rows of the images that the base has not seen, and the test rows. Raises DataError, DemoFailed."""
    from model import data
    from scripts.demo_parts.clinics import held_out_rows

    train, test = held_out_rows(Path(case.base), Path(case.data))
    return data.split_by_group(train, 0.2, 3) if case.tune else (train, test)


def names(split: str) -> Sequence[str]:
    """The clinics of a split."""
    return CHANCE if split == "chance" else tuple(SPLITS[split][1])


def clinic_of(sample: Sample, split: str) -> str:
    """The clinic that has this row; every row has one."""
    if split == "chance":
        return CHANCE[hashlib.sha256(sample.group.encode()).digest()[0] % len(CHANCE)]
    key, clinics = SPLITS[split]
    return next(name for name, values in clinics.items() if sample.meta.get(key) in values)


def train(case: Case, samples: Sequence[Sample], side_by_side: bool = False) -> tuple[Any, dict[str, Any]]:
    """The adapter that the case asks for, and how much a clinic sent in a round."""
    from model import adapters, wire

    s = case.settings
    state = adapters.initial(Path(case.base), s["rank"], s["alpha"], s["targets"], case.seed)
    clinics = samples_of(case, samples)
    if case.what not in MODES:
        (mine,) = clinics.values()
        return alone(case, mine, state, s["rounds"] * s["steps"]), {}
    return federate(case, clinics, wire.rounded(state), side_by_side)


def samples_of(case: Case, samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Who trains on which samples: the clinics of a federation, or the one that is alone or has everything."""
    if case.what in ("pooled", "brief"):
        return {case.what: list(samples)}
    clinics: dict[str, list[Sample]] = {name: [] for name in names(case.split)}
    for sample in samples:
        clinics[clinic_of(sample, case.split)].append(sample)
    return clinics if case.what in MODES else {case.what: clinics[case.what.removeprefix("local ")]}


@dataclass
class Done:
    """Where a case is: the factors, and of each round the bytes a clinic sent, the error, the clinics set aside."""

    state: Any
    sent: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    aside: list[list[int]] = field(default_factory=list)


def alone(case: Case, samples: Sequence[Sample], state: Any, steps: int) -> Any:
    """Both factors in one training without rounds."""
    from scripts.benches import slake_clinics

    done = resumed(case, state)
    if not done.sent:
        done = Done(slake_clinics.one(case, samples, state, "AB", steps, case.seed), [0.0], [0.0])
        keep(case, done)
    return done.state


def federate(
    case: Case, clinics: Mapping[str, Sequence[Sample]], state: Any, side_by_side: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Rounds of the case's aggregation; patients are counted, shares are capped, as on the server."""
    from model import wire
    from scripts.benches.slake_clinics import Clinics

    s, done = case.settings, resumed(case, state)
    with Clinics(case, clinics, state, side_by_side) as all_of_them:
        for number in range(len(done.sent), s["rounds"]):
            before = wire.rounded(done.state)
            conclude(done, case, before, all_of_them.answers(before, number), clinics)
    facts = {"bytes_up": sum(done.sent) / len(done.sent), "distance": sum(done.errors) / len(done.errors)}
    return wire.rounded(done.state), facts | ({"aside": done.aside} if s.get("aside") else {})


def conclude(
    done: Done, case: Case, before: Any, replies: Sequence[Any], clinics: Mapping[str, Sequence[Sample]]
) -> None:
    """Put the replies of the next round together and write down where the case is."""
    from model import wire
    from server import aggregate

    patients = [len({sample.group for sample in mine}) for mine in clinics.values()]
    _combine(done, case, before, replies, patients)
    done.sent.append(wire.packed_bytes(replies[0], aggregate.factors_of_round(case.what, len(done.sent))))
    keep(case, done)


def _combine(done: Done, case: Case, before: Any, replies: Sequence[Any], patients: Sequence[int]) -> None:
    """Put the replies of a round together as the case says."""
    from server import aggregate
    from server.strategy import shares

    s, kept = case.settings, list(range(len(replies)))
    if s.get("aside"):
        kept = aggregate.multi_krum(before, replies, s["aside"])
    done.aside.append([n for n in range(len(replies)) if n not in kept])
    used, cut = [replies[n] for n in kept], int(s.get("cut", 0))
    weights = shares([patients[n] for n in kept])
    done.state, _ = aggregate.combine(case.what, before, used, weights, cut=cut)
    equal = [1 / len(used)] * len(used)
    found = aggregate.fit(before, done.state, used, equal if cut else weights, s["alpha"] / s["rank"])[""]
    done.errors.append(found.relative_error)


def _kept(case: Case) -> Path:
    return Path(case.out).with_suffix(".npz")


def keep(case: Case, done: Done) -> None:
    """Write down where the case is, so that one that is stopped loses one round at most."""
    from model.files import write_atomic

    buffer = io.BytesIO()
    rest = json.dumps({"case": asdict(case), "sent": done.sent, "errors": done.errors, "aside": done.aside})
    np.savez(buffer, **done.state, _rest=rest)
    write_atomic(_kept(case), buffer.getvalue())


def resumed(case: Case, first: Any) -> Done:
    """What was done before; `first` and nothing else at the start, or where the file is of another case."""
    if not _kept(case).exists():
        return Done(first)
    with np.load(_kept(case)) as file:
        rest = json.loads(str(file["_rest"]))
        if rest.pop("case") != asdict(case):
            return Done(first)
        return Done({name: file[name] for name in first}, **rest)


def run(case: Case, side_by_side: bool = False) -> dict[str, Any]:
    """Train, answer, and say which questions were answered right."""
    import torch

    from client.trainer import TrainingFailed
    from model import adapters, evaluate, llava, metrics
    from model.backends import TorchBackend

    torch.set_num_threads(1)
    start, (samples, test) = time.monotonic(), rows(case)
    folder: Path | None = None
    facts: dict[str, Any] = {}
    if case.what != "none":
        try:
            state, facts = train(case, samples, side_by_side)
        except TrainingFailed as error:
            if not case.tune:
                raise
            return failed(case, str(error), test)
        folder = Path(case.out).with_suffix("") / "adapter"
        adapters.save(
            folder, state, adapters.spec_of(state, case.settings["alpha"], llava.base_sha256(Path(case.base)))
        )
    backend = TorchBackend(Path(case.base), 4, folder)
    right: dict[str, bool] = {}
    for finished in evaluate.answer_batches(backend, test, BATCH, max_new_tokens=LONGEST):
        right |= {test[n].id: metrics.exact(found.text, test[n].answer) for n, found in finished}
    return {**asdict(case), **facts, "right": right, "seconds": round(time.monotonic() - start, 1)}


def failed(case: Case, why: str, test: Sequence[Sample]) -> dict[str, Any]:
    """The result of a rate with which training ends in no number: nothing is right."""
    return {**asdict(case), "failed": why, "right": {row.id: False for row in test}}


def main(arguments: Sequence[str]) -> None:
    """Do the case named on the command line."""
    from model.files import write_atomic

    case = Case(**json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    write_atomic(Path(case.out), (json.dumps(run(case, "--side-by-side" in arguments)) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
