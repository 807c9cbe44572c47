"""Lies of a clinic that no check of its reply alone can tell: all arrays are finite and the update's norm is allowed.

`labels`: honest training on answers that belong to other questions. `opposite`: its update turned round and as long as
the gate lets through. `turned`: turned round and no longer than it was. `noise`: a random step of the length that the
gate lets through. Not here: lies that the gate refuses (`scripts/soak`).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from model.adapters import State
from model.data import Sample

LIES = ("labels", "opposite", "turned", "noise")


def samples(lie: str, mine: Sequence[Sample], seed: int) -> Sequence[Sample]:
    """What the clinic trains on: its samples, or with `labels` the same with answers in another order."""
    if lie != "labels":
        return mine
    order = np.random.default_rng(seed).permutation(len(mine))
    return [replace(row, answer=mine[other].answer) for row, other in zip(mine, order, strict=True)]


def reply(lie: str, honest: State, before: State, reach: float, seed: int) -> State:
    """What the clinic sends; `reach` is rate times steps, from which the gate reckons the norm that it allows."""
    from server.strategy import norm_cap

    if lie in ("", "labels"):
        return honest
    draw = np.random.default_rng(seed)
    moved = {name: array - before[name] for name, array in honest.items()}
    if lie == "noise":
        moved = {name: draw.standard_normal(array.shape) for name, array in honest.items()}
    norm = float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in moved.values())))
    far = 0.999 * norm_cap(reach, 1, sum(array.size for array in honest.values())) / max(norm, 1e-12)
    if lie == "turned":
        far = 1.0
    sign = 1 if lie == "noise" else -1
    return {name: (before[name] + sign * far * array).astype(np.float32) for name, array in moved.items()}
