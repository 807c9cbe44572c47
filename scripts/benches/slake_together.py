"""Cases of `scripts/bench slake` trained together: the clinics of all cases of a way in one process (`slake_grouped`).

What a case has reached is kept as `slake_case` keeps it, which then finds the training done and asks the questions.
A case whose factors are no longer numbers stays where it was; `slake_case` goes on from there and says what it found.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scripts.benches import slake_case, slake_runs
from scripts.benches.slake_case import Case, Done
from scripts.benches.slake_grouped import GroupedModel, Job
from server.aggregate import MODES

MOST = 72  # clinics in one pass


def train_all(wanted: Sequence[Case]) -> None:
    """Train every case that is not done, those of equal settings together; goes on where it was stopped."""
    waiting = [case for case in wanted if case.what != "none" and not slake_runs.done(case)]
    waiting = [case for case in waiting if _reached(case) < (case.settings["rounds"] if case.what in MODES else 1)]
    for _, cases in groupby(sorted(waiting, key=_kind), key=_kind):
        clinics = len(slake_case.names("modality"))
        for some in _chunks(list(cases), MOST // clinics):
            Together(some).run()


def _kind(case: Case) -> str:
    """What cases must have in common to be trained together; ways without rounds differ in their samples alone."""
    way = case.what if case.what in MODES else "alone"
    return json.dumps([way, case.tune, case.settings, _reached(case)], sort_keys=True)


def _reached(case: Case) -> int:
    """Rounds of a case that are done; one for a training without rounds."""
    return len(slake_case.resumed(case, {}).sent)


def _chunks(cases: Sequence[Case], most: int) -> Iterator[list[Case]]:
    for first in range(0, len(cases), most):
        yield list(cases[first : first + most])


class Together:
    """Cases of one kind: their clinics' samples, and one model for all of them."""

    def __init__(self, cases: Sequence[Case]) -> None:
        from client import trainer
        from client.batches import Batches
        from model import adapters
        from scripts.benches.slake_clinics import options

        self.cases, self.settings = list(cases), cases[0].settings
        s = self.settings
        base, (samples, _) = Path(cases[0].base), slake_case.rows(cases[0])
        self.first = [adapters.initial(base, s["rank"], s["alpha"], s["targets"], case.seed) for case in cases]
        modules = [adapters.module(name) for name in self.first[0]]
        self.mine = [slake_case.samples_of(case, samples) for case in cases]
        model, one = trainer.prepare(samples, base, self.first[0], trainer.Options(**options(cases[0])))
        made: dict[tuple[str, str], Batches] = {}
        for case, clinics in zip(cases, self.mine, strict=True):
            for name, rows in clinics.items():
                if (case.split, name) not in made:
                    made[case.split, name] = Batches(rows, model, one.loaded, modules, s["batch"], 0)
        self.batches = [[made[c.split, n] for n in mine] for c, mine in zip(cases, self.mine, strict=True)]
        self.lost: set[int] = set()  # cases whose factors are no longer numbers
        self.model = GroupedModel(model, sum(map(len, self.batches)), s["alpha"] / s["rank"])

    def run(self) -> None:
        """All that is still to do."""
        if self.cases[0].what in MODES:
            self._rounds()
        else:
            self._alone()

    def _alone(self) -> None:
        s = self.settings
        jobs = [Job(b[0], state, c.seed) for b, state, c in zip(self.batches, self.first, self.cases, strict=True)]
        with tqdm(total=s["rounds"] * s["steps"], unit="step", desc=self._name()) as bar:
            states = self.model.train(jobs, "AB", bar.total, s["lr"], s["lr_ratio"], lambda: bar.update())
        for case, state in zip(self.cases, states, strict=True):
            if all(np.isfinite(array).all() for array in state.values()):
                slake_case.keep(case, Done(state, [0.0], [0.0]))

    def _rounds(self) -> None:
        from model import wire

        done = [slake_case.resumed(c, wire.rounded(f)) for c, f in zip(self.cases, self.first, strict=True)]
        with tqdm(initial=len(done[0].sent), total=self.settings["rounds"], unit="round", desc=self._name()) as bar:
            for number in range(bar.n, bar.total):
                self._round(number, done)
                bar.update()

    def _round(self, number: int, done: Sequence[Done]) -> None:
        from model import adapters, wire
        from scripts.benches.slake_clinics import asked

        s, (factor, lr, _) = self.settings, asked(self.cases[0], number)
        before = [wire.rounded(one.state) for one in done]
        jobs = [
            Job(batches, state, asked(case, number)[2])
            for case, state, clinics in zip(self.cases, before, self.batches, strict=True)
            for batches in clinics
        ]
        after = iter(self.model.train(jobs, factor, s["steps"], lr, s["lr_ratio"]))
        for place, case in enumerate(self.cases):
            whole: list[Any] = [next(after) for _ in self.batches[place]]
            try:
                replies = [wire.rounded({n: a for n, a in w.items() if adapters.factor(n) in factor}) for w in whole]
            except adapters.AdapterRejected as error:
                tqdm.write(f"{case.name}, round {number + 1}: {error}")
                self.lost.add(place)
            if place not in self.lost:
                slake_case.conclude(done[place], case, before[place], replies, self.mine[place])

    def _name(self) -> str:
        return f"{self.cases[0].what.split()[0]}, {len(self.model)} clinics"
