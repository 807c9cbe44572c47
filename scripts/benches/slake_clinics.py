"""The clinics of a case of `scripts/bench slake`: they train one after the other, or each in a process of its own.

Side by side the round takes as long as one clinic, where there is a core for each; what they send is the same.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from model.data import Sample
from scripts.benches import slake_lies
from scripts.benches.slake_case import Case

_own: "_Clinic | None" = None  # in a process of its own: the clinic that it is


class _Clinic:
    """A clinic with its rows, as its lie has them, and what its training makes ready first and only once."""

    def __init__(self, case: Case, mine: Sequence[Sample], lie: str, state: Any) -> None:
        self.case, self.lie, self.mine = case, lie, slake_lies.samples(lie, mine, case.seed)
        self.ready = prepare(case, self.mine, state)

    def answer(self, before: Any, number: int) -> Any:
        """What it sends in the round after `number` others."""
        from model import adapters, wire

        s, (factor, lr, seed) = self.case.settings, asked(self.case, number)
        now = replace(self.case, settings={**s, "lr": lr})
        after = one(now, self.mine, before, factor, s["steps"], seed, self.ready)
        reply = {n: a for n, a in after.items() if adapters.factor(n) in factor}
        reach = lr * s["steps"] * (s["lr_ratio"] if factor == "B" else 1)
        return wire.rounded(slake_lies.reply(self.lie, reply, before, reach, seed))


class Clinics(AbstractContextManager["Clinics"]):
    """All clinics of a case; the first one tells the case's lie."""

    def __init__(
        self, case: Case, clinics: Mapping[str, Sequence[Sample]], state: Any, side_by_side: bool = False
    ) -> None:
        lies = [case.settings.get("lie", "")] + [""] * (len(clinics) - 1)
        given = [(mine, lie, state) for mine, lie in zip(clinics.values(), lies, strict=True)]
        self._stack = ExitStack()
        self._here = [] if side_by_side else [_Clinic(case, *each) for each in given]
        self._apart = [self._process(asdict(case), *each) for each in given] if side_by_side else []

    def _process(self, *given: Any) -> ProcessPoolExecutor:
        made = ProcessPoolExecutor(1, get_context("spawn"), initializer=_become, initargs=given)
        return self._stack.enter_context(made)

    def answers(self, before: Any, number: int) -> list[Any]:
        """What each of them sends in the round after `number` others, in their order."""
        if not self._apart:
            return [clinic.answer(before, number) for clinic in self._here]
        asked = [process.submit(_answer, before, number) for process in self._apart]
        return [reply.result() for reply in asked]

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def asked(case: Case, number: int) -> tuple[str, float, int]:
    """What the round after `number` others asks of a clinic: factors, rate of A, seed of the samples' order."""
    from server.aggregate import factors_of_round
    from server.strategy import rate_of_round

    s = case.settings
    lr = rate_of_round(s["lr"], number + 1, s["rounds"], s["lr_final"])
    return factors_of_round(case.what, number), lr, 1000 * case.seed + number


def _become(case: Mapping[str, Any], mine: Sequence[Sample], lie: str, state: Any) -> None:
    global _own
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _own = _Clinic(Case(**case), mine, lie, state)


def _end_with_parent() -> None:
    """A case that is killed leaves no clinic behind."""
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _answer(before: Any, number: int) -> Any:
    assert _own is not None
    return _own.answer(before, number)


def prepare(case: Case, samples: Sequence[Sample], state: Any) -> Any:
    """What a clinic's training makes ready first, and here only once."""
    from client import trainer

    return trainer.prepare(samples, Path(case.base), state, trainer.Options(**options(case)))


def options(case: Case) -> dict[str, Any]:
    """Options of the clinics' trainer."""
    own = {name: case.settings[name] for name in ("lr", "lr_ratio", "batch", "alpha", "mu")}
    return {**own, "bits": 4, "threads": 1}


def one(
    case: Case, samples: Sequence[Sample], state: Any, factor: str, steps: int, seed: int, prepared: Any = None
) -> Any:
    """Train the factors on these samples as a clinic does."""
    from client import trainer

    how = {**options(case), "seed": seed, "prepared": prepared}
    return trainer.train(samples, Path(case.base), state, tuple(factor), steps, **how).state
