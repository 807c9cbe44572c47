"""What a lying clinic of a soak sends instead of its honest reply, and what must come of it.

A lie that the gate refuses must leave the adapter bit for bit as it is without the liar. Two lies pass the gate as
they must (nobody can tell them from training): these may move the adapter by no more than their share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Vectors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Lie:
    """`word` is in the reason of the refusal; empty for one that passes the gate. `tell` makes it of both contents."""

    word: str
    tell: Callable[[Any, Any], Any]


def _vectors(content: Any) -> Vectors:
    return {key: array.numpy() for key, array in content.array_records["arrays"].items()}


def _reply(honest: Any, vectors: Vectors, **metrics: Any) -> Any:
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

    told = {**dict(honest.metric_records["metrics"]), **{name.replace("_", "-"): v for name, v in metrics.items()}}
    arrays = ArrayRecord({key: Array(vector) for key, vector in vectors.items()})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(told)})


def _changed(word: str, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Lie:
    """Every vector goes through `change`, which gets what the server sent and what training made of it."""

    def tell(asked: Any, honest: Any) -> Any:
        before, after = _vectors(asked), _vectors(honest)
        with np.errstate(all="ignore"):
            wrong = {key: change(before[key].astype(np.float32), one.astype(np.float32)) for key, one in after.items()}
            return _reply(honest, {key: one.astype(after[key].dtype) for key, one in wrong.items()})

    return Lie(word, tell)


def _noise(like: np.ndarray, size: float) -> np.ndarray:
    """A random direction of norm `size`."""
    draw = np.random.default_rng(0).normal(size=like.shape)
    return draw * (size / np.linalg.norm(draw))


def _told(word: str, **metrics: Any) -> Lie:
    return Lie(word, lambda asked, honest: _reply(honest, _vectors(honest), **metrics))


def _renamed(asked: Any, honest: Any) -> Any:
    return _reply(honest, {f"evil_{key}": vector for key, vector in _vectors(honest).items()})


def _older(asked: Any, honest: Any) -> Any:
    number = int(asked.config_records["config"]["server-round"])
    return _reply(honest, _vectors(honest), server_round=number - 1)


def _broken(asked: Any, honest: Any) -> Any:
    raise RuntimeError("this clinic's trainer broke")


LIES: dict[str, Lie] = {
    "NaN": _changed("non-finite", lambda before, after: after * np.nan),
    "infinity": _changed("non-finite", lambda before, after: after + np.inf),
    "sign flipped, 10 times": _changed("norm", lambda before, after: before - 10 * (after - before)),
    "100 times": _changed("norm", lambda before, after: before + 100 * (after - before)),
    "random numbers": _changed("norm", lambda before, after: before + _noise(before, 50.0)),
    "a longer vector": _changed("", lambda before, after: np.append(after, np.float32(0))),
    "other keys": Lie("keys", _renamed),
    "10^9 examples": _told("num-examples", num_examples=10**9),
    "more patients than examples": _told("num-cases", num_cases=10**6),
    "an older round": Lie("round", _older),
    "a trainer that breaks": Lie("failed", _broken),
    "sign flipped, within the cap": _changed("", lambda before, after: before - (after - before)),
    "a million patients": _told("", num_examples=1_000_000, num_cases=1_000_000),
}
PASSING = ("sign flipped, within the cap", "a million patients")
