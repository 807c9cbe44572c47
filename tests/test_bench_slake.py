"""`scripts/bench slake` and `liars` without a model: cases that fail, GPUs, lies in which the gate finds nothing."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from model.data import Sample
from scripts.benches import slake, slake_case, slake_clinics, slake_lies, slake_runs, slake_table
from server.strategy import norm_cap

REACH = 0.05
BEFORE = {"x.lora_A.weight": np.ones((4, 30), np.float32), "y.lora_A.weight": np.zeros((4, 20), np.float32)}
HONEST = {name: array + np.float32(0.001) for name, array in BEFORE.items()}


def _norm(reply: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(reply[name] - BEFORE[name]).sum() for name in reply)))


@pytest.mark.parametrize("lie", ["opposite", "noise"])
def test_a_lie_is_as_long_as_the_gate_lets_through(lie: str) -> None:
    told = slake_lies.reply(lie, HONEST, BEFORE, REACH, 1)
    cap = norm_cap(REACH, 1, sum(array.size for array in HONEST.values()))
    assert told.keys() == HONEST.keys() and all(array.dtype == np.float32 for array in told.values())
    assert 0.99 * cap < _norm(told) <= cap * 1.0001
    assert lie == "noise" or all((told[name] < BEFORE[name]).all() for name in told)


def test_a_turned_update_is_as_long_as_the_honest_one() -> None:
    told = slake_lies.reply("turned", HONEST, BEFORE, REACH, 1)
    assert _norm(told) == pytest.approx(_norm(HONEST), rel=1e-4)
    assert all((told[name] < BEFORE[name]).all() for name in told)


def test_an_honest_clinic_and_one_with_wrong_labels_send_what_they_trained() -> None:
    assert slake_lies.reply("", HONEST, BEFORE, REACH, 1) is HONEST
    assert slake_lies.reply("labels", HONEST, BEFORE, REACH, 1) is HONEST


def test_wrong_labels_are_the_same_answers_to_other_questions() -> None:
    blank = np.zeros((4, 4, 3), np.uint8)
    mine = [Sample(str(n), blank, f"q{n}", f"a{n}", "open", f"g{n}", "slake") for n in range(40)]
    told = slake_lies.samples("labels", mine, 1)
    assert sorted(row.answer for row in told) == sorted(row.answer for row in mine)
    assert [row.question for row in told] == [row.question for row in mine]
    assert sum(a.answer == b.answer for a, b in zip(told, mine, strict=True)) < 5
    assert slake_lies.samples("", mine, 1) is mine
    places = [slake_case.clinic_of(row, "chance") for row in mine]
    assert set(places) == set(slake_case.names("chance"))


def test_a_case_that_fails_stops_no_other_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def start(case: slake_case.Case, gpu: str | None, *_: str) -> "subprocess.Popen[bytes]":
        asked.append(gpu)
        work = (
            "raise SystemExit(1)"
            if case.seed == 2
            else f'open({case.out!r}, \'w\').write(\'{{"settings": {{}}, "base": "", "data": ""}}\')'
        )
        return subprocess.Popen([sys.executable, "-c", work])

    monkeypatch.setattr(slake_runs, "_start", start)
    monkeypatch.setattr(slake_runs, "_gpus", lambda: ["0", "1"])
    wanted = [slake_case.Case("pooled", "modality", n, "", "", str(tmp_path / f"{n}.json")) for n in range(1, 5)]
    with pytest.raises(click.ClickException, match=r"1 cases failed.*2\.log"):
        slake_runs.run_all(wanted, 2, None)
    assert [slake_runs.done(case) for case in wanted] == [True, False, True, True]
    assert asked == ["0", "1", "0", "1"]


def test_rates_are_chosen_from_or_given_for_one_way() -> None:
    rates, given = slake.rates_of("2e-3,1e-3:8,pooled=5e-4:16,ffa=2e-3:16:0.1")
    assert [slake.named(rate) for rate in rates] == ["0.002:1:1", "0.001:8:1"]
    assert {way: slake.named(rate) for way, rate in given.items()} == {"pooled": "0.0005:16:1", "ffa": "0.002:16:0.1"}


def test_a_rate_counts_with_the_mean_of_its_tries(tmp_path: Path) -> None:
    rates, _ = slake.rates_of("2e-3,1e-3:8")
    tried = list(slake.tuning(tmp_path, tmp_path, tmp_path, slake.SETTINGS, ["pooled"], rates, tries=2))
    assert len({case.out for case in tried}) == 4 and [case.seed for case in tried] == [1, 1, 2, 2]
    (tmp_path / "cases").mkdir()
    for case, right in zip(tried, [True, False, False, False], strict=True):
        found = {**asdict(case), "right": {"1": right, "2": True}}
        Path(case.out).write_text(json.dumps(found), encoding="utf-8")
    assert slake.scored(tried) == {"pooled": {"0.002:1:1": 75.0, "0.001:8:1": 50.0}}


@pytest.mark.parametrize("text", ["fast", "1e-3:2:3:4", "1e-3:", "local=1e-3"])
def test_what_is_no_rate_is_said(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is no rate|no rate of its own"):
        slake.rates_of(text)


def test_together_has_no_time_limit_and_says_so(tmp_path: Path) -> None:
    told = CliRunner().invoke(
        slake.main, ["--data", str(tmp_path), "--out", str(tmp_path), "--together", "--minutes", "1"]
    )
    assert told.exit_code == 2 and "--minutes does not go with --together" in told.output


def test_the_table_holds_each_way_against_both_ways_of_pooling() -> None:
    gain = {"points": 10.0, "low": 8.0, "high": 12.0, "share": 0.5, "share_low": 0.4, "share_high": 0.6}
    row = {"seeds": 2, "percent": 60.0, "low": 55.0, "high": 65.0, "clinics": {"ct": 50.0}}
    found = {"none": row, "ffa": {**row, "pooled": gain, "brief": {**gain, "share": 0.9}, "bytes_up": 2048.0}}
    text = slake_table.table({"tried": {"ffa": {"0.002:1:1": 61.2}}, "rows": 9, "splits": {"modality": found}})
    assert "- ffa: 0.002:1:1 61.2" in text and "| none | 2 | 60.0 [55.0, 65.0] | 50.0 |  |  |  |  |" in text
    last = "| ffa | 2 | 60.0 [55.0, 65.0] | 50.0 | +10.0 [+8.0, +12.0] | 50 % [40, 60] | 90 % [40, 60] | 2 |"
    assert last in text


ROUNDS = {"rounds": 3, "steps": 2, "lr": 0.1, "lr_ratio": 1.0, "lr_final": 1.0, "alpha": 4.0, "rank": 4}


def test_a_case_goes_on_after_the_round_in_which_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {
        f"base_model.model.{layer}.lora_{factor}.weight": np.ones((4, 4), np.float32)
        for layer in "xy"
        for factor in "AB"
    }
    asked: list[int] = []

    def one(case: slake_case.Case, mine: object, state: dict[str, np.ndarray], factor: str, *rest: object) -> object:
        asked.append(int(str(rest[1])))
        if asked == [1000, 1000, 1000, 1001]:
            raise KeyboardInterrupt
        return {n: a + np.float32(0.3 + 0.01 * asked[-1]) if n[-8] in factor else a for n, a in state.items()}

    monkeypatch.setattr(slake_clinics, "one", one)
    monkeypatch.setattr(slake_clinics, "prepare", lambda *_: None)
    blank = np.zeros((4, 4, 3), np.uint8)
    clinics = {n: [Sample(n, blank, "q", "a", "open", n, "slake")] for n in ("ct", "mri", "xray")}
    case = slake_case.Case("alternating", "modality", 1, "", "", str(tmp_path / "case.json"), ROUNDS)
    with pytest.raises(KeyboardInterrupt):
        slake_case.federate(case, clinics, first)
    resumed, facts = slake_case.federate(case, clinics, first)
    assert asked == [1000] * 3 + [1001] + [1001] * 3 + [1002] * 3  # the first round was not done again
    whole, same = slake_case.federate(replace(case, out=str(tmp_path / "whole.json")), clinics, first)
    assert facts == same and all(np.array_equal(resumed[name], whole[name]) for name in first)
    other = replace(case, settings={**ROUNDS, "lr": 0.2})
    assert slake_case.resumed(other, first) == slake_case.Done(first)  # what was kept is of other settings


def test_a_share_is_that_of_the_seeds_that_both_have(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"q{n}" for n in range(40)]
    groups, places = {i: i for i in ids}, dict.fromkeys(ids, "one")

    def right(share: float) -> dict[str, bool]:
        return {i: n < 40 * share for n, i in enumerate(ids)}

    runs = {"none": {0: right(0.2)}, "pooled": {1: right(0.6), 2: right(0.6), 3: right(1.0)}, "brief": {}}
    row = slake_table._row({1: right(0.4), 2: right(0.4)}, runs, groups, places)
    assert row["pooled"]["share"] == pytest.approx(0.5) and "brief" not in row and row["seeds"] == 2
    assert "pooled" not in slake_table._row(runs["none"], runs, groups, places)


def test_pooled_training_takes_the_steps_of_one_clinic_and_the_examples_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model import adapters

    asked: list[tuple[int, int, int]] = []

    def one(case: slake_case.Case, mine: list[Sample], state: object, factor: str, steps: int, seed: int) -> object:
        asked.append((case.settings["batch"], len(mine), steps))
        return {}

    monkeypatch.setattr(slake_clinics, "one", one)
    monkeypatch.setattr(adapters, "initial", lambda *_: {})
    blank = np.zeros((4, 4, 3), np.uint8)
    meta = [{"modality": name} for name in ("CT", "MRI", "MRI", "X-Ray")]
    samples = [Sample(str(n), blank, "q", "a", "open", str(n), "slake", meta=own) for n, own in enumerate(meta)]
    chosen = {**ROUNDS, "batch": 5, "targets": "decoder"}
    for what in ("pooled", "brief", "local mri"):
        own = slake.sized(what, chosen)
        case = slake_case.Case(what, "modality", 1, "", "", str(tmp_path / f"{what}.json"), own)
        slake_case.train(case, samples)
        slake_case.train(case, samples)  # kept: not done again
    assert asked == [(15, 4, 6), (5, 4, 6), (5, 2, 6)]


def test_clinics_side_by_side_send_what_they_send_one_after_the_other(tiny: Path, tmp_path: Path) -> None:
    from model import adapters, phantoms

    mine = phantoms.make(4, ["plain"], seed=1, size=48)
    clinics = {"ct": mine[:4], "mri": mine[4:]}
    state = adapters.initial(tiny, 2, 4.0, "decoder", 0)
    own = {**ROUNDS, "rank": 2, "rounds": 1, "steps": 1, "batch": 2, "mu": 0.0, "lie": "turned"}
    case = slake_case.Case("alternating", "modality", 1, str(tiny), "", str(tmp_path / "case.json"), own)
    replies = []
    for side_by_side in (False, True):
        with slake_clinics.Clinics(case, clinics, state, side_by_side) as both:
            replies.append(both.answers(state, 0))
    for alone, beside in zip(*replies, strict=True):
        assert alone.keys() == beside.keys() and all(np.allclose(alone[n], beside[n], atol=1e-6) for n in alone)
    assert any(not np.array_equal(replies[0][0][n], replies[0][1][n]) for n in replies[0][0])
