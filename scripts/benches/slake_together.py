"""Cases of `scripts/bench slake` trained together: the clinics of all cases of a way in one process (`slake_grouped`).

What a case has reached is kept as `slake_case` keeps it, which then finds the training done and asks the questions.
A case whose factors are no longer numbers stays where it was: a rate that was tried is then out of the question, and of
any other case `slake_case` goes on from there and says what it found.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from model.files import write_atomic
from scripts.benches import slake_case, slake_runs
from scripts.benches.slake_case import Case, Done
from scripts.benches.slake_grouped import GroupedModel, Job
from server.aggregate import MODES, factors_of_round

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
    """What cases must have in common to be trained together: the factors of each round, and all but their rates."""
    way = "".join(factors_of_round(case.what, number) for number in range(2)) if case.what in MODES else "alone"
    same = {key: value for key, value in case.settings.items() if key not in ("lr", "lr_ratio", "lr_final")}
    return json.dumps([way, case.tune, same, _reached(case)], sort_keys=True)


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
        base, (samples, self.test) = Path(cases[0].base), slake_case.rows(cases[0])
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
        self.model = GroupedModel(model, list(made.values()), sum(map(len, self.batches)), s["alpha"] / s["rank"])

    def run(self) -> None:
        """All that is still to do."""
        if self.cases[0].what in MODES:
            self._rounds()
        else:
            self._alone()

    def _alone(self) -> None:
        jobs = [
            Job(batches, state, case.seed, case.settings["lr"], case.settings["lr_ratio"])
            for (batches,), state, case in zip(self.batches, self.first, self.cases, strict=True)
        ]
        with tqdm(total=self.settings["rounds"] * self.settings["steps"], unit="step", desc=self._name()) as bar:
            states = self.model.train(jobs, "AB", bar.total, lambda: bar.update())
        for case, state in zip(self.cases, states, strict=True):
            if all(np.isfinite(array).all() for array in state.values()):
                slake_case.keep(case, Done(state, [0.0], [0.0]))
            else:
                self._lose(case, "the factors are no longer numbers")

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

        plans = [asked(case, number) for case in self.cases]
        factor = plans[0][0]
        before = [wire.rounded(one.state) for one in done]
        jobs = [
            Job(batches, state, seed, lr, case.settings["lr_ratio"])
            for case, (_, lr, seed), state, clinics in zip(self.cases, plans, before, self.batches, strict=True)
            for batches in clinics
        ]
        after = iter(self.model.train(jobs, factor, self.settings["steps"]))
        for place, case in enumerate(self.cases):
            whole: list[Any] = [next(after) for _ in self.batches[place]]
            try:
                replies = [wire.rounded({n: a for n, a in w.items() if adapters.factor(n) in factor}) for w in whole]
            except adapters.AdapterRejected as error:
                if place not in self.lost:
                    self._lose(case, f"round {number + 1}: {error}")
                self.lost.add(place)
            if place not in self.lost:
                slake_case.conclude(done[place], case, before[place], replies, self.mine[place])

    def _lose(self, case: Case, why: str) -> None:
        """Say so; where a rate was tried, that is its result."""
        tqdm.write(f"{case.name}: {why}")
        if case.tune:
            found = slake_case.failed(case, why, self.test)
            write_atomic(Path(case.out), (json.dumps(found) + "\n").encode())

    def _name(self) -> str:
        ways = dict.fromkeys(case.what.split()[0] for case in self.cases)
        return f"{', '.join(ways)}: {len(self.model)} clinics"
