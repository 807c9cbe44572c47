"""Aggregation: exact where it claims to be, the best of its rank where it cannot be, and honest about the rest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import adapters
from server import aggregate
from server.aggregate import combine, factors_of_round, fit, multi_krum, product_svd, trimmed_mean

B, A = "base_model.model.layer.lora_B.weight", "base_model.model.layer.lora_A.weight"
OUT, IN = 9, 7


def pair(generator: np.random.Generator, rank: int = 2) -> dict[str, np.ndarray]:
    return {B: generator.normal(size=(OUT, rank)), A: generator.normal(size=(rank, IN))}


def product(state: dict[str, np.ndarray]) -> np.ndarray:
    return state[B] @ state[A]


def asked(mode: str, before: dict, generator: np.random.Generator, clinics: int) -> list[dict]:
    """Replies of clinics that moved exactly the factors that the mode asks for."""
    which = factors_of_round(mode, 1)
    names = [name for name in (B, A) if name[-8] in which]
    return [{n: before[n] + generator.normal(size=before[n].shape) for n in names} for _ in range(clinics)]


def weights_of(generator: np.random.Generator, clinics: int) -> list[float]:
    drawn = generator.uniform(0.1, 1, clinics)
    return list(drawn / drawn.sum())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), clinics=st.integers(1, 6), mode=st.sampled_from(aggregate.LINEAR))
def test_linear_modes_apply_exactly_the_mean_of_the_updates(seed: int, clinics: int, mode: str) -> None:
    generator = np.random.default_rng(seed)
    before = pair(generator)
    replies, weights = asked(mode, before, generator, clinics), weights_of(generator, clinics)
    after, discarded = combine(mode, before, replies, weights)
    ideal = sum(w * product({**before, **reply}) for w, reply in zip(weights, replies, strict=True))
    assert np.abs(product(after) - ideal).max() <= 1e-5 * np.abs(ideal).max()
    assert fit(before, after, replies, weights, 2.0)[""].relative_error <= 1e-5
    assert discarded == 0.0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), clinics=st.integers(1, 5))
def test_the_figures_are_those_of_the_dense_updates(seed: int, clinics: int) -> None:
    generator = np.random.default_rng(seed)
    before = pair(generator)
    replies, weights = [pair(generator) for _ in range(clinics)], weights_of(generator, clinics)
    after, _ = combine("factor-average", before, replies, weights)
    found = fit(before, after, replies, weights, 3.0)
    updates = [product(reply) - product(before) for reply in replies]
    mean = sum(w * u for w, u in zip(weights, updates, strict=True))
    assert found[B].ideal == pytest.approx(3 * np.linalg.norm(mean), abs=1e-9)
    assert found[B].error == pytest.approx(3 * np.linalg.norm(product(after) - product(before) - mean), abs=1e-9)
    drift = sum(w * np.linalg.norm(u - mean) for w, u in zip(weights, updates, strict=True))
    assert found[B].drift == pytest.approx(3 * drift, abs=1e-9)
    assert found[""].ideal == pytest.approx(found[B].ideal)


def test_the_gauge_changes_nothing_but_for_the_factor_average() -> None:
    """(B R)(R^-1 A) is the same update: clinics that agree must not cancel each other."""
    generator = np.random.default_rng(5)
    before, same = pair(generator), pair(generator)
    turn = np.linalg.qr(generator.normal(size=(2, 2)))[0]
    replies = [same, {B: same[B] @ turn, A: turn.T @ same[A]}, {B: -same[B], A: -same[A]}]
    weights = [0.4, 0.3, 0.3]
    good, _ = combine("product-svd", before, replies, weights)
    assert np.allclose(product(good), product(same))
    bad, _ = combine("factor-average", before, replies, weights)
    assert fit(before, bad, replies, weights, 1.0)[""].relative_error > 0.3
    assert fit(before, good, replies, weights, 1.0)[""].relative_error < 1e-9


def test_product_svd_is_the_best_of_its_rank_and_says_what_it_drops() -> None:
    generator = np.random.default_rng(6)
    pairs = [(p[B], p[A]) for p in (pair(generator, 4), pair(generator, 2), pair(generator, 3))]  # mixed ranks
    weights = [0.5, 0.2, 0.3]
    ideal = sum(w * b @ a for w, (b, a) in zip(weights, pairs, strict=True))
    values = np.linalg.svd(ideal, compute_uv=False)
    for rank in (1, 3, 7):
        b, a, discarded = product_svd(pairs, weights, rank)
        assert (b.shape, a.shape) == ((OUT, rank), (rank, IN))
        assert np.linalg.norm(b @ a - ideal) == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), abs=1e-9)
        assert discarded == pytest.approx((values[rank:] ** 2).sum() / (values**2).sum(), abs=1e-12)


def test_a_rank_beyond_what_there_is_is_filled_with_zeros() -> None:
    one = pair(np.random.default_rng(7), 1)
    b, a, discarded = product_svd([(one[B], one[A])], [1.0], 4)
    assert np.allclose(b @ a, product(one))
    assert discarded < 1e-12
    assert not product_svd([(0 * one[B], one[A])], [1.0], 2)[0].any()


def test_trimming_takes_the_edge_off_poison() -> None:
    honest = [np.full(3, 1.0 + 0.01 * n) for n in range(4)]
    poisoned = [*honest, np.full(3, 1e6)]
    assert np.allclose(trimmed_mean(poisoned, 1), np.mean([1.01, 1.02, 1.03]))
    with pytest.raises(ValueError, match="more than 4 updates"):
        trimmed_mean(honest, 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factors", ["B", "AB"])
def test_multi_krum_keeps_those_with_the_least_sum_of_distances_of_dense_updates(seed: int, factors: str) -> None:
    """Reference: the definition in Blanchard et al. 2017, on the whole matrices B A of every layer."""
    draw, rank = np.random.default_rng(seed), 2
    before = {A: draw.normal(size=(rank, 7)), B: draw.normal(size=(5, rank))}
    sent = [name for name in before if adapters.factor(name) in factors]
    replies = [{name: before[name] + draw.normal(size=before[name].shape) for name in sent} for _ in range(7)]
    dense = [{**before, **reply}[B] @ {**before, **reply}[A] for reply in replies]
    scores = []
    for one in dense:
        apart = sorted(float(np.square(one - other).sum()) for other in dense if other is not one)
        scores.append(sum(apart[: 7 - 2 - 2]))
    assert multi_krum(before, replies, 2) == sorted(int(place) for place in np.argsort(scores)[:5])


def test_multi_krum_needs_enough_neighbours() -> None:
    state = {A: np.ones((1, 2)), B: np.ones((2, 1))}
    with pytest.raises(ValueError, match="at least 5 updates, there are 4"):
        multi_krum(state, [state] * 4, 1)


def test_rounds_ask_for_the_factors_of_their_mode() -> None:
    assert [factors_of_round("alternating", n) for n in range(3)] == ["B", "A", "B"]
    assert [factors_of_round("ffa", n) for n in range(2)] == ["B", "B"]
    assert factors_of_round("product-svd", 3) == factors_of_round("factor-average", 0) == "AB"


@pytest.mark.parametrize(("mode", "cut", "words"), [("mean", 0, "no aggregation"), ("product-svd", 1, "trimming")])
def test_what_cannot_be_combined_is_refused(mode: str, cut: int, words: str) -> None:
    state = pair(np.random.default_rng(1))
    with pytest.raises(ValueError, match=words):
        combine(mode, state, [state, state, state], [1 / 3] * 3, cut=cut)
    with pytest.raises(ValueError, match="nothing"):
        combine("ffa", state, [], [])
