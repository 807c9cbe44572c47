"""The gate and the mean: one bad reply never counts and never ends a run; what counts is averaged exactly."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from model import adapters, wire
from server import checkpoint as store
from server import events, rounds, strategy
from server.strategy import Ask, Gate, Update, aggregate, norm_cap, plain, rate_of_round, shares
from tests.server import fakes
from tests.server.bad_replies import BAD
from tests.server.fakes import Clock, FakeGrid, honest


def one_round(
    tmp_path: Path, clinics: dict, monkeypatch: pytest.MonkeyPatch, **values: object
) -> rounds.RoundCheckpoint:
    """One round of these clinics over the small adapter."""
    monkeypatch.setattr("model.llava.base_sha256", lambda folder: fakes.BASE)
    store.save(tmp_path, fakes.first())
    clock = Clock()
    chosen = fakes.settings(tmp_path, tmp_path, num_server_rounds=1, **values)
    return rounds.federate(FakeGrid(clinics), chosen, sleep=clock.sleep, clock=clock)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_rejected_with_its_reason_and_the_others_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bad, word = BAD[kind]
    clinics = {1: honest(), 2: honest(), 3: honest(), 4: honest(), 5: bad}
    after = one_round(tmp_path, clinics, monkeypatch)
    assert after.changed and after.updates == 1
    assert [row.clinic for row in after.accepted] == ["clinic-1", "clinic-2", "clinic-3", "clinic-4"]
    assert [row.clinic for row in after.rejected] == ["clinic-5"]
    assert word in after.rejected[0].reason
    assert after.rejected[0].reason.isprintable()
    for name, array in after.state.items():
        expected = 0.01 if adapters.factor(name) == "B" else 0.0
        np.testing.assert_allclose(array - fakes.small_state()[name], expected, atol=1e-7)
    evidence = json.loads((tmp_path / "releases/round-00001/release.json").read_text())
    assert evidence["rejected"][0]["clinic"] == "clinic-5"
    assert "clinic-5" not in evidence["contributed"]


def test_a_metric_under_a_name_of_the_servers_own_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("round", "clinic", "event", "self", "at", "examples", "norm", "bytes")

    def odd(node: int, message: Message) -> RecordDict:
        content = fakes.reply(fakes.moved(message, 0.01), fakes.asked(message)[0])
        for name in names:
            content["metrics"][name] = -7.0
        return content

    after = one_round(tmp_path, {1: honest(), 2: honest(), 3: odd}, monkeypatch)
    assert len(after.accepted) == 3
    rows = [row for row in events.read(tmp_path)[0] if row.get("clinic") == "clinic-3" and row["event"] == "accepted"]
    assert [(row["round"], row["examples"]) for row in rows] == [(1, 10)]
    assert rows[0]["norm"] > 0 and rows[0]["bytes"] > 0 and "T" in rows[0]["at"]


def test_whatever_nobody_thought_of_is_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGrid({})
    gate, message = Gate(_ask({7: "north"})), _message(7)
    monkeypatch.setattr(type(gate), "_open", lambda *_: 1 // 0)
    found = gate.take(7, message)
    assert isinstance(found, store.Rejection) and "ZeroDivisionError" in found.reason and not gate.updates


def test_a_number_too_large_for_a_float_is_no_metric() -> None:
    assert strategy._metrics({"a": 10**400, "b": float("nan"), "c": -2, "d": float("-inf")}) == {"c": -2}


@pytest.mark.parametrize("kind", ["NaN weight", "no examples", "no reply"])
def test_below_the_quorum_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    bad = BAD[kind][0]
    after = one_round(tmp_path, {1: honest(), 2: honest(), 3: bad, 4: bad, 5: bad}, monkeypatch)
    assert not after.changed and after.updates == 0
    assert "quorum of 3" in after.reason
    assert len(after.rejected) == 3
    assert all(np.array_equal(after.state[name], array) for name, array in fakes.small_state().items())


def test_the_odd_one_out_is_set_aside_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(node: int, message: Message) -> object:
        return fakes.reply(fakes.moved(message, -0.01), fakes.asked(message)[0])

    clinics = {1: honest(), 2: backwards, 3: honest(), 4: honest(), 5: honest()}
    after = one_round(tmp_path / "five", clinics, monkeypatch, set_aside=1)
    assert [row.clinic for row in after.accepted] == ["clinic-1", "clinic-3", "clinic-4", "clinic-5"]
    assert [(row.clinic, "furthest" in row.reason) for row in after.rejected] == [("clinic-2", True)]
    for name, array in after.state.items():
        expected = 0.01 if adapters.factor(name) == "B" else 0.0
        np.testing.assert_allclose(array - fakes.small_state()[name], expected, atol=1e-7)
    del clinics[5]
    four = one_round(tmp_path / "four", clinics, monkeypatch, set_aside=1)
    assert not four.changed and "quorum of 5" in four.reason


def test_a_round_waits_for_as_many_as_its_rules_need_and_sends_nothing_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(node: int, message: Message) -> object:
        return pytest.fail("asked all the same")

    after = one_round(tmp_path, {1: never, 2: never}, monkeypatch, set_aside=1, min_clinics=2)
    assert not after.changed and not after.rejected and after.bytes_down == 0
    assert "quorum of 5 (min-clinics 2, trim 0, set-aside 1)" in after.reason


@pytest.mark.parametrize(("trim", "aside", "quorum"), [(0, 0, 2), (1, 0, 3), (0, 1, 5), (1, 2, 7), (3, 1, 8)])
def test_how_many_replies_the_rules_on_top_need(tmp_path: Path, trim: int, aside: int, quorum: int) -> None:
    assert fakes.settings(tmp_path, tmp_path, min_clinics=2, trim=trim, set_aside=aside).quorum == quorum


def test_the_rate_falls_on_a_cosine_and_not_below_its_floor() -> None:
    rates = [rate_of_round(0.2, number, 5, 0.1) for number in range(1, 8)]
    assert rates[0] == pytest.approx(0.2) and rates[2] == pytest.approx(0.11)
    assert rates[4:] == pytest.approx([0.02] * 3) and sorted(rates, reverse=True) == rates
    assert rate_of_round(0.2, 1, 1, 0.1) == rate_of_round(0.2, 4, 5, 1.0) == pytest.approx(0.2)


@pytest.mark.parametrize("mode", ["alternating", "factor-average"])
def test_rates_and_the_cap_follow_the_round_and_the_factor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr("model.llava.base_sha256", lambda folder: fakes.BASE)
    given = {"aggregation": mode, "lr": 0.2, "lr_ratio": 4.0, "lr_final": 0.1, "local_steps": 10}
    run = rounds.Federation(FakeGrid({}), fakes.settings(tmp_path, tmp_path, num_server_rounds=3, **given))
    before, sizes = fakes.first(), {"A": 0, "B": 0}
    for name, array in before.state.items():
        sizes[adapters.factor(name)] += array.size
    for number, lr in enumerate((0.2, 0.11, 0.02), 1):
        factor = "AB" if mode == "factor-average" else "BAB"[number - 1]
        ask = run._ask(number, factor, before, {})
        config = rounds.asked(ask, run.settings)
        assert (config["lr"], config["lr-ratio"]) == (pytest.approx(lr), 4.0)
        reach = {"A": sizes["A"], "B": 16 * sizes["B"]}
        assert ask.max_norm == pytest.approx(lr * 10 * np.sqrt(sum(reach[f] for f in factor)))
    assert "lr-ratio" not in rounds.asked(ask, fakes.settings(tmp_path, tmp_path)), "clinics of before do not know it"


def test_one_metric_more_is_no_reason_to_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty(node: int, message: Message) -> object:
        return fakes.reply(fakes.moved(message, 0.01), fakes.asked(message)[0], x=1.0, histogram=[1.0, 2.0])

    after = one_round(tmp_path, {1: honest(), 2: honest(), 3: chatty}, monkeypatch)
    assert len(after.accepted) == 3 and not after.rejected


def _ask(clinics: dict[int, str]) -> Ask:
    before = fakes.first()
    return Ask(1, "B", before.state, before.spec, clinics, 2e-3, 10.0)


def _message(node: int) -> Message:
    grid = FakeGrid({node: honest()})
    number = grid.push_messages([_train_message(node)])
    return next(iter(grid.pull_messages(list(number))))


def _train_message(node: int) -> Message:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    arrays = ArrayRecord({wire.key(f): Array(wire.pack(fakes.small_state(), f)) for f in "AB"})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1, "factor": "B"})})
    return Message(content, node, "train")


def test_a_second_reply_and_a_stranger_do_not_count() -> None:
    FakeGrid({})  # makes this process a task, without which Flower builds no message
    gate = Gate(_ask({7: "north"}))
    message = _message(7)
    assert isinstance(gate.take(7, message), Update)
    gate.take(7, message)
    gate.take(8, message)
    assert [row.reason for row in gate.rejected] == [
        "this node has already answered in this round",
        "this node was not asked",
    ]
    assert len(gate.updates) == 1


def _update(node: int, array: np.ndarray, examples: int) -> Update:
    return Update(node, f"clinic-{node}", {"w": array}, examples, examples, 0.0, array.nbytes, {})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.permutations(range(6)))
def test_the_mean_is_numpys_and_the_order_plays_no_part(examples: list[int], seed: int, order: list[int]) -> None:
    draw = np.random.default_rng(seed)
    updates = [_update(node, draw.normal(size=(3, 4)).astype(np.float32), n) for node, n in enumerate(examples)]
    found = aggregate(updates, {})
    mean, rows = found.state, found.accepted
    shuffled = aggregate([updates[i] for i in order if i < len(updates)], {}).state
    assert np.array_equal(mean["w"], shuffled["w"])
    capped = np.minimum(examples, 2 * np.percentile(examples, 50, method="lower"))
    reference = np.average([u.arrays["w"].astype(np.float64) for u in updates], axis=0, weights=capped)
    np.testing.assert_allclose(mean["w"], reference, atol=1e-6)
    assert sum(row.weight for row in rows) == pytest.approx(1.0)


def test_every_order_of_five_replies_gives_the_same_bits() -> None:
    draw = np.random.default_rng(3)
    updates = [_update(node, draw.normal(size=64).astype(np.float32), 10 + node) for node in range(5)]
    results = {aggregate(list(order), {}).state["w"].tobytes() for order in itertools.permutations(updates)}
    assert len(results) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1), st.sampled_from(["A", "B"]))
def test_alternating_is_exact_for_the_product(clinics: int, seed: int, factor: str) -> None:
    """The mean of one factor, the other frozen and the same everywhere, is the mean of the updates B·A."""
    draw = np.random.default_rng(seed)
    frozen = draw.normal(size=(2, 6)) if factor == "B" else draw.normal(size=(4, 2))
    shape = (4, 2) if factor == "B" else (2, 6)
    updates = [_update(node, draw.normal(size=shape), int(draw.integers(1, 99))) for node in range(clinics)]
    found = aggregate(updates, {})
    mean, rows = found.state, found.accepted

    def product(array: np.ndarray) -> np.ndarray:
        return array @ frozen if factor == "B" else frozen @ array

    ideal = sum(row.weight * product(u.arrays["w"]) for row, u in zip(rows, updates, strict=True))
    np.testing.assert_allclose(product(mean["w"]), ideal, atol=1e-10)


def test_averaging_both_factors_at_once_would_not_be_exact() -> None:
    """Why rounds alternate: two clinics with the same update in other factors would cancel each other."""
    b, a = np.ones((4, 1)), np.ones((1, 6))
    naive = ((b + -b) / 2) @ ((a + -a) / 2)
    assert np.abs(naive - b @ a).max() == 1.0


def test_a_large_clinic_weighs_at_most_twice_the_median() -> None:
    assert shares([10, 10, 1000]) == pytest.approx([0.25, 0.25, 0.5])
    assert shares([5]) == [1.0]
    assert shares([1_000_000, 100]) == pytest.approx([2 / 3, 1 / 3])  # the mean of two would bound neither


def test_one_reply_moves_the_mean_by_at_most_its_share_of_the_cap() -> None:
    before = fakes.first()
    cap, count = 2.0, 4
    still = {n: a for n, a in before.state.items() if adapters.factor(n) == "B"}
    size = sum(a.size for a in still.values())
    loud = {n: a + np.float32(cap / np.sqrt(size)) for n, a in still.items()}
    others = [Update(i, "y", still, 10, 10, 0.0, 0, {}) for i in range(1, count)]
    replies = [Update(0, "x", loud, 10, 10, cap, 0, {}), *others]
    mean = aggregate(replies, {}).state
    moved = np.sqrt(sum(((mean[n] - still[n]) ** 2).sum() for n in still))
    assert moved == pytest.approx(cap / count, rel=1e-5)


def test_the_norm_cap_holds_for_real_adamw() -> None:
    """AdamW on random gradients stays below the cap that is derived from its rate and steps."""
    import torch

    torch.manual_seed(0)
    slow, fast = (torch.nn.Parameter(torch.zeros(1000)) for _ in range(2))
    groups = [{"params": [slow], "lr": 3e-3}, {"params": [fast], "lr": 8 * 3e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(50):
        slow.grad, fast.grad = torch.randn(1000) + 1.0, torch.randn(1000) + 1.0
        optimizer.step()
    assert float(slow.detach().norm()) <= norm_cap(3e-3, 50, 1000)
    assert float(torch.cat([slow, fast]).detach().norm()) <= norm_cap(3e-3, 50, 1000 + 8**2 * 1000)


def test_words_of_a_clinic_cannot_write_to_the_terminal() -> None:
    assert plain("a\x1b[2J\nb" + "x" * 1000) == ("a [2J b" + "x" * 1000)[:300]
