"""Averaging LoRA updates: four ways to turn the clinics' factors into one adapter, and how far each is from the ideal.

The update of clinic k is s B_k A_k (s = alpha / rank); the ideal is the weighted mean of the updates, not of the
factors (FedEx-LoRA, arXiv:2410.09432). `alternating` (RoLoRA, arXiv:2502.01755) and `ffa` (FFA-LoRA, arXiv:2403.12313)
are exact because one factor is frozen and the same everywhere; `product-svd` (FlexLoRA, arXiv:2402.11505) is the best
approximation of one rank; `factor-average` is the common baseline, wrong wherever clinics differ. No dense update is
ever formed: everything works on the stacked factors, layer by layer. NumPy only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from model.adapters import State

MODES = ("alternating", "ffa", "product-svd", "factor-average")
LINEAR = ("alternating", "ffa")  # the mean of what is sent is the mean of the updates


@dataclass(frozen=True)
class Fit:
    """How an aggregate lies to the clinics' own updates, for one layer or all: Frobenius norms of s B A.

    `ideal`: norm of the weighted mean of the clinics' updates; `error`: distance from it to what was applied; `drift`:
    weighted mean distance of a clinic's update from it.
    """

    ideal: float
    error: float
    drift: float

    @property
    def relative_error(self) -> float:
        """Error as a share of the ideal update; 0 where there was no update."""
        return self.error / self.ideal if self.ideal else 0.0


def factors_of_round(mode: str, updates: int) -> str:
    """Which factors the clinics train after `updates` rounds that changed something: "A", "B" or "AB"."""
    if mode == "alternating":
        return "B" if updates % 2 == 0 else "A"
    return "B" if mode == "ffa" else "AB"


def weighted_mean(arrays: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Sum of weights times arrays in float64, in the order given."""
    total = np.zeros(arrays[0].shape, np.float64)
    for array, weight in zip(arrays, weights, strict=True):
        total += weight * array.astype(np.float64)
    return total


def trimmed_mean(arrays: Sequence[np.ndarray], cut: int) -> np.ndarray:
    """Mean of each value over the clinics without its `cut` smallest and largest (Yin et al. 2018, arXiv:1803.01498).

    Unweighted: a clinic that claims many patients must not outvote the trimming. Needs more than 2 x cut arrays.
    """
    if len(arrays) <= 2 * cut:
        raise ValueError(f"trimming {cut} at each end needs more than {2 * cut} updates, there are {len(arrays)}")
    ordered = np.sort(np.stack(arrays).astype(np.float64), axis=0)
    return ordered[cut : len(arrays) - cut].mean(axis=0)


def multi_krum(before: State, replies: Sequence[State], liars: int) -> list[int]:
    """Which replies to keep where up to `liars` lie: all but that many, those nearest to their neighbours.

    Multi-Krum (Blanchard et al. 2017, arXiv:1703.02757) on the updates s B A themselves: a reply's score is the sum of
    squared distances to its n - liars - 2 nearest. Raises ValueError for fewer than 2 x liars + 3 replies.
    """
    count = len(replies)
    if count < 2 * liars + 3:
        raise ValueError(f"setting {liars} aside needs at least {2 * liars + 3} updates, there are {count}")
    inner = np.zeros((count, count))
    for name_b, name_a in layers(before):
        old = (before[name_b], before[name_a])
        inner += products([(reply.get(name_b, old[0]), reply.get(name_a, old[1])) for reply in replies])
    squares = np.diag(inner)[:, None] + np.diag(inner)[None] - 2 * inner
    scores = np.sort(squares + np.diag(np.full(count, np.inf)), axis=1)[:, : count - liars - 2].sum(axis=1)
    return sorted(int(place) for place in np.argsort(scores, kind="stable")[: count - liars])


def product_svd(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], weights: Sequence[float], rank: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Best rank-`rank` factors B (out, rank), A (rank, in) of sum w_k B_k A_k, and the share of energy discarded.

    QR of both stacks of factors, then the SVD of the small product; `pairs` may differ in rank. The singular values
    are split evenly between the factors.
    """
    left = np.concatenate(
        [weight * b.astype(np.float64) for (b, _), weight in zip(pairs, weights, strict=True)], axis=1
    )
    right = np.concatenate([a.astype(np.float64) for _, a in pairs], axis=0)
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, values, v = np.linalg.svd(r_left @ r_right.T)
    energy = float((values**2).sum())
    kept = min(rank, len(values))
    root = np.sqrt(values[:kept])
    b, a = np.zeros((left.shape[0], rank)), np.zeros((rank, right.shape[1]))
    b[:, :kept] = q_left @ u[:, :kept] * root
    a[:kept] = (root[:, None] * v[:kept]) @ q_right.T
    return b, a, float((values[kept:] ** 2).sum() / energy) if energy else 0.0


def combine(
    mode: str, before: State, replies: Sequence[State], weights: Sequence[float], *, cut: int = 0
) -> tuple[State, float]:
    """The factors after a round, and the mean share of energy that the rank discarded.

    `replies` hold the factors that were asked for (`factors_of_round`); what they lack is taken from `before`.
    `cut` > 0 replaces weighted means by trimmed ones. Raises ValueError for an unknown mode, for nothing to combine,
    and for trimming with `product-svd`, where values of different clinics do not correspond.
    """
    if mode not in MODES:
        raise ValueError(f"there is no aggregation {mode!r}; choose one of {', '.join(MODES)}")
    if not replies:
        raise ValueError("there is nothing to aggregate")
    if mode != "product-svd":
        after = {}
        for name, first in replies[0].items():
            arrays = [reply[name] for reply in replies]
            mean = trimmed_mean(arrays, cut) if cut else weighted_mean(arrays, weights)
            after[name] = mean.astype(first.dtype)
        return {**before, **after}, 0.0
    if cut:
        raise ValueError("trimming does not go with product-svd: its factors are each clinic's own")
    lost, state = [], dict(before)
    for name_b, name_a in layers(before):
        pairs = [(reply[name_b], reply[name_a]) for reply in replies]
        b, a, share = product_svd(pairs, weights, before[name_a].shape[0])
        state[name_b], state[name_a] = b.astype(before[name_b].dtype), a.astype(before[name_a].dtype)
        lost.append(share)
    return state, float(np.mean(lost))


def layers(state: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    """(name of B, name of A) of every layer, in the order of their names."""
    for name in sorted(state):
        if name.endswith("lora_B.weight"):
            yield name, name.removesuffix("lora_B.weight") + "lora_A.weight"


def fit(
    before: State, after: State, replies: Sequence[State], weights: Sequence[float], scale: float
) -> dict[str, Fit]:
    """`Fit` of every layer (by the name of its B) and of all together (""), `scale` being s."""
    found, sums = {}, np.zeros(2)
    drift = 0.0
    for name_b, name_a in layers(before):
        old = (before[name_b], before[name_a])
        theirs = [(reply.get(name_b, old[0]), reply.get(name_a, old[1])) for reply in replies]
        inner = products([*theirs, old, (after[name_b], after[name_a])])
        mean = np.array([*weights, 0.0, 0.0])
        start, applied = np.eye(len(mean))[-2:] * sum(weights)
        ideal, error = _norm(inner, mean - start), _norm(inner, mean - applied)
        apart = [_norm(inner, mean - sum(weights) * own) for own in np.eye(len(mean))[: len(theirs)]]
        drifted = float(np.dot(weights, apart))
        found[name_b] = Fit(scale * ideal, scale * error, scale * drifted)
        sums += np.array([ideal, error]) ** 2
        drift += drifted**2
    found[""] = Fit(scale * float(np.sqrt(sums[0])), scale * float(np.sqrt(sums[1])), scale * float(np.sqrt(drift)))
    return found


def products(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Inner products (pairs, pairs) of all the matrices B A, none of which is formed; ranks may differ.

    <B1 A1, B2 A2> is the sum of (B1^T B2) * (A1 A2^T). Where all pairs share a factor (the same array), the other one
    is multiplied by its triangular factor instead, which for many clinics is cheaper by far.
    """
    first_b, first_a = pairs[0]
    for shared, side in ((all(a is first_a for _, a in pairs), 1), (all(b is first_b for b, _ in pairs), 0)):
        if shared:
            common = pairs[0][side].astype(np.float64)
            root = np.linalg.qr(common.T if side else common)[1]
            moved = [(b @ root.T if side else root @ a).ravel() for b, a in pairs]
            flat = np.stack(moved)
            return np.asarray(flat @ flat.T)
    left = np.concatenate([b.astype(np.float64) for b, _ in pairs], axis=1)
    right = np.concatenate([a.astype(np.float64) for _, a in pairs], axis=0)
    both = (left.T @ left) * (right @ right.T)
    starts = np.cumsum([0, *(b.shape[1] for b, _ in pairs[:-1])])
    return np.asarray(np.add.reduceat(np.add.reduceat(both, starts, axis=0), starts, axis=1))


def describe(found: Mapping[str, Fit], mode: str, discarded: float, rounding: float = 0.0) -> dict[str, object]:
    """The figures of a round as plain values: in total, and [ideal, error, drift] of every layer.

    `rounding` is the distance to what travels on, whose values have 16 bits.
    """
    total = found[""]
    return {
        "aggregation": mode,
        "ideal": total.ideal,
        "error": total.error,
        "relative_error": total.relative_error,
        "rounding": rounding,
        "drift": total.drift,
        "discarded": discarded,
        "layers": {name: [part.ideal, part.error, part.drift] for name, part in found.items() if name},
    }


def _norm(inner: np.ndarray, weights: np.ndarray) -> float:
    """Norm of the weighted sum of matrices with these inner products; rounding leaves about 1e-8 of the largest."""
    return float(np.sqrt(max(0.0, weights @ inner @ weights)))
