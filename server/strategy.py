"""The gate in front of aggregation: which replies count, with which weight, and what a round makes of them.

A reply counts only if it has exactly the arrays that were asked for, finite, of this round, within the norm cap, with
believable numbers of examples and patients. Anything else becomes a Rejection with its reason and never ends the run.
The arithmetic is in `server.aggregate`. Poison that looks like training within the cap is for the robust rules there,
which are off by default, and for `server.release`, which keeps the evidence for a person.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model import wire
from model.adapters import AdapterRejected, AdapterSpec, State
from server import aggregate as aggregation
from server.checkpoint import Contribution, Rejection
from server.spool import Spool

MAX_EXAMPLES = 1_000_000  # more than any clinic's training folder holds; above it the number is not believed
MAX_METRIC = 1e300  # a whole number beyond it, which a stick can carry, is no number for a chart or a sum
MAX_METRICS = 64  # entries of a metric record; more is noise or an attempt to fill the disk
WEIGHT_CAP = 2.0  # times the lower median number of patients: one large hospital must not own the model
REASON_LENGTH = 300  # characters of a clinic's own words that are kept


@dataclass(frozen=True)
class Ask:
    """What a round asks for: `factor` ("A", "B" or "AB") trained from `state`, by `clinics` (node id -> name).

    `state` is what the clinics get, so rounded to what travels (`model.wire`).
    """

    round: int
    factor: str
    state: State
    spec: AdapterSpec
    clinics: Mapping[int, str]
    lr: float  # of the factors A
    max_norm: float  # largest norm of an update that is believed

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every array of the adapter."""
        return dict(zip(self.spec.names, self.spec.shapes, strict=True))


@dataclass(frozen=True)
class Update:
    """A reply that passed the gate: arrays of the factors asked for, and what the clinic says about its training."""

    node: int
    clinic: str
    arrays: State
    examples: int
    cases: int  # patients, or pictures where patients are not known: what it weighs
    norm: float
    bytes: int
    metrics: dict[str, float]


NODE_UNAVAILABLE = 5  # Flower's ErrorCode for a SuperNode without a sign of life
SILENT = "no reply before the deadline"
NOT_GIVEN = "its reply was not among the files"  # by stick


class Gate:
    """Takes the replies of one round one by one, in any order; with a spool they wait on the disk."""

    def __init__(self, ask: Ask, spool: Spool | None = None) -> None:
        self.ask, self._spool = ask, spool
        self.updates: dict[int, Update] = {}
        self.rejected: list[Rejection] = []
        self._seen: set[int] = set()

    def take(self, node: int, message: Any) -> Update | Rejection:
        """Look at the reply (a Flower Message) of `node`; the verdict is kept. Never raises for what a clinic sent."""
        clinic = self.ask.clinics.get(node, f"unknown node {node}")
        try:
            if node not in self.ask.clinics:
                raise AdapterRejected("this node was not asked")
            if node in self._seen:
                raise AdapterRejected("this node has already answered in this round")
            self._seen.add(node)
            update = self._open(node, clinic, message)
        except AdapterRejected as error:
            return self._reject(clinic, str(error))
        except Exception as error:  # whatever nobody thought of: one reply must never end the run
            return self.unreadable(node, error)
        self.updates[node] = update
        return update

    def unreadable(self, node: int, error: Exception) -> Rejection:
        """Record that the reply of `node` could not even be put together from what arrived."""
        self._seen.add(node)
        clinic = self.ask.clinics.get(node, f"unknown node {node}")
        return self._reject(clinic, f"the reply is unreadable: {type(error).__name__}: {error}")

    def _reject(self, clinic: str, reason: str) -> Rejection:
        rejection = Rejection(clinic, plain(reason))
        self.rejected.append(rejection)
        return rejection

    def silent(self, reason: str = SILENT) -> list[Rejection]:
        """Record every asked clinic that has not answered, for this reason; returns those rejections."""
        late = [Rejection(name, reason) for node, name in sorted(self.ask.clinics.items()) if node not in self._seen]
        self.rejected += late
        return late

    def _open(self, node: int, clinic: str, message: Any) -> Update:
        if message.has_error() and message.error.code == NODE_UNAVAILABLE:
            raise AdapterRejected("the clinic's client was stopped, or its line was down for too long")
        if message.has_error():
            raise AdapterRejected(f"the clinic's training failed: {message.error.reason or message.error.code}")
        content = message.content
        for record in content.config_records.values():
            if "refused" in record:
                raise AdapterRejected(f"the clinic refused: {record['refused']}")
        if set(content.array_records) != {"arrays"} or set(content.metric_records) != {"metrics"}:
            raise AdapterRejected("the reply does not hold one array record and one metric record")
        metrics = _metrics(content.metric_records["metrics"])
        examples = _count(content.metric_records["metrics"], "num-examples", MAX_EXAMPLES)
        cases = _count(content.metric_records["metrics"], "num-cases", examples)
        if metrics.get("server-round") != self.ask.round:
            raise AdapterRejected(f"the reply is of round {metrics.get('server-round')}, not of round {self.ask.round}")
        arrays = wire.unpack(content.array_records["arrays"], self.ask.shapes(), tuple(self.ask.factor))
        wire.rounded(arrays)  # a value beyond 16 bits could not be sent on
        norm = _distance(arrays, self.ask.state)
        if norm > self.ask.max_norm:
            raise AdapterRejected(f"the update's norm {norm:.3g} is above the cap of {self.ask.max_norm:.3g}")
        size = wire.arrived_bytes(content.array_records["arrays"])
        if self._spool is not None:
            arrays = self._spool.put(node, arrays)
        return Update(node, clinic, arrays, examples, cases, norm, size, metrics)


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite plain numbers of a metric record; lists and odd values are left out, they decide nothing."""
    if len(record) > MAX_METRICS:
        raise AdapterRejected(f"the reply has {len(record)} metrics, more than {MAX_METRICS}")
    return {
        str(key)[:60]: value
        for key, value in record.items()
        if isinstance(value, (int, float)) and abs(value) <= MAX_METRIC  # which neither NaN nor infinity is
    }


def _count(record: Mapping[str, Any], name: str, most: int) -> int:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise AdapterRejected(f"{name} is {str(value)[:40]}, expected a whole number from 1 to {most}")
    return value


def _distance(arrays: State, before: Mapping[str, np.ndarray]) -> float:
    """Euclidean norm of the whole update."""
    total = 0.0
    for name, array in arrays.items():
        difference = array.astype(np.float64) - before[name]
        total += float(np.vdot(difference, difference))
    return math.sqrt(total)


def plain(text: str) -> str:
    """One printable line: what a clinic sends must not write control characters into a terminal or a log."""
    return "".join(c if c.isprintable() else " " for c in text)[:REASON_LENGTH]


def shares(counts: Sequence[int], cap: float = WEIGHT_CAP) -> list[float]:
    """Share of each clinic in the mean: its count, at most `cap` times the lower median, divided by the sum.

    A round counts patients, an examination (`server.candidate`) questions. The lower median, because that of two
    clinics is their mean, twice of which bounds neither.
    """
    limit = cap * float(sorted(counts)[(len(counts) - 1) // 2])
    capped = [min(float(n), limit) for n in counts]
    return [n / sum(capped) for n in capped]


@dataclass(frozen=True)
class Outcome:
    """What a round made of its updates: all factors, who took part with which share, and how exact the result is.

    `aside`: whose updates were left out because they were the furthest from the others'.
    """

    state: State
    accepted: tuple[Contribution, ...]
    quality: dict[str, Any]
    aside: tuple[Rejection, ...] = ()


def aggregate(
    updates: Sequence[Update],
    before: State,
    *,
    mode: str = "alternating",
    cut: int = 0,
    aside: int = 0,
    scale: float = 1.0,
    cap: float = WEIGHT_CAP,
) -> Outcome:
    """Combine the updates in node order, so that arrival plays no part; `scale` is alpha / rank, for the figures.

    `aside` updates, the furthest from the others, are left out first (`server.aggregate.multi_krum`), then values are
    trimmed by `cut`. Raises ValueError without any update, or with too few for either, and AdapterRejected where the
    result is beyond what 16 bits hold.
    """
    ordered = sorted(updates, key=lambda update: update.node)
    kept = aggregation.multi_krum(before, [u.arrays for u in ordered], aside) if aside else range(len(ordered))
    odd = "its update is the furthest from the others' (Multi-Krum)"
    left_out = tuple(Rejection(u.clinic, odd) for place, u in enumerate(ordered) if place not in kept)
    ordered = [ordered[place] for place in kept]
    weights = shares([update.cases for update in ordered], cap) if ordered else []
    replies = [update.arrays for update in ordered]
    state, discarded = aggregation.combine(mode, before, replies, weights, cut=cut)
    if cut:
        weights = [1 / len(ordered)] * len(ordered)
    found = aggregation.fit(before, state, replies, weights, scale)
    rounding = aggregation.fit(before, wire.rounded(state), [state], [1.0], scale)[""].error
    rows = zip(ordered, weights, strict=True)
    accepted = tuple(Contribution(u.clinic, u.examples, w, u.norm, u.bytes, u.metrics, u.cases) for u, w in rows)
    return Outcome(state, accepted, aggregation.describe(found, mode, discarded, rounding), left_out)


def norm_cap(lr: float, steps: int, elements: float) -> float:
    """How far `steps` AdamW steps of rate `lr` can move `elements` values: about lr for each value in each step."""
    return lr * steps * math.sqrt(elements)


def rate_of_round(lr: float, number: int, rounds: int, final: float) -> float:
    """Learning rate of round `number` (from 1) of `rounds`: a cosine from `lr` down to `final` times `lr`."""
    done = min(1.0, (number - 1) / max(1, rounds - 1))
    return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))
