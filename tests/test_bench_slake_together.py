"""`scripts/bench slake --together`: clinics side by side on one base learn what each learns by itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import adapters, phantoms
from model.data import Sample
from scripts.benches import slake_case, slake_runs, slake_together

SETTINGS = {"targets": "decoder+projector", "rank": 2, "alpha": 4.0, "batch": 3, "mu": 0.0, "rounds": 3, "steps": 2}
RATE = {"lr": 1e-3, "lr_ratio": 4.0, "lr_final": 0.5}


@pytest.fixture
def cases(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes cases of these ways, all on the same few samples of unequal clinics."""
    drawn = phantoms.make(8, ["plain"], seed=1, size=48)
    names = ["CT"] * 9 + ["MRI"] * 4 + ["X-Ray"] * (len(drawn) - 13)
    rows = [replace(row, meta={"modality": name}) for row, name in zip(drawn, names, strict=True)]
    monkeypatch.setattr(slake_case, "rows", lambda case: (rows, rows[:1]))

    def make(folder: str, *ways: tuple[str, int], **rate: float) -> list[slake_case.Case]:
        (tmp_path / folder).mkdir(exist_ok=True)
        blank = slake_case.Case("", "modality", 0, str(tiny), "", "", {**SETTINGS, **RATE, **rate})
        made = [replace(blank, what=what, seed=seed) for what, seed in ways]
        return [replace(case, out=str(tmp_path / folder / f"{case.name}.json")) for case in made]

    return make


def kept(case: slake_case.Case) -> dict[str, np.ndarray]:
    with np.load(Path(case.out).with_suffix(".npz")) as file:
        return {name: file[name] for name in file.files if name.startswith("base_model.")}


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> float:
    """Distance of two trained adapters, as a share of the way that the first one went."""
    way = sum(float(np.square(one[n] - start[n]).sum()) for n in one)
    return float(np.sqrt(sum(float(np.square(one[n] - other[n]).sum()) for n in one) / way))


@pytest.mark.parametrize("ways", [("alternating",), ("product-svd",), ("brief", "local mri")])
def test_together_they_learn_what_each_learns_alone(cases: Any, tiny: Path, ways: tuple[str, ...]) -> None:
    asked = [(way, seed) for way in ways for seed in (1, 2)]
    beside, alone = cases("beside", *asked), cases("alone", *asked)
    slake_together.train_all(beside)
    for case in alone:
        slake_case.train(case, slake_case.rows(case)[0])
    trained = [kept(case) for case in beside]
    for case, mine, other in zip(alone, trained, [*trained[1:], trained[0]], strict=True):
        start = adapters.initial(tiny, 2, 4.0, SETTINGS["targets"], case.seed)
        assert apart(kept(case), mine, start) < 0.1
        assert apart(kept(case), other, start) > 0.5


@pytest.mark.parametrize("way", ["alternating", "factor-average", "pooled"])
def test_each_rate_moves_its_own_clinics_alone(cases: Any, tiny: Path, way: str) -> None:
    rates = [{}, {"lr": 2e-3}, {"lr_ratio": 16.0, "lr_final": 1.0}]
    beside, alone = ([cases(f"{name}{n}", (way, 1), **rate)[0] for n, rate in enumerate(rates)] for name in "ba")
    slake_together.train_all(beside)
    start = adapters.initial(tiny, 2, 4.0, SETTINGS["targets"], 1)
    for case, other in zip(alone, beside, strict=True):
        slake_case.train(case, slake_case.rows(case)[0])
        assert apart(kept(case), kept(other), start) < 0.1
    assert apart(kept(beside[0]), kept(beside[1]), start) > 0.3 < apart(kept(beside[0]), kept(beside[2]), start)


def test_what_was_stopped_goes_on_where_each_case_was(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = (cases(name, ("alternating", 1), ("alternating", 2)) for name in ("whole", "stopped"))
    slake_together.train_all(whole)
    conclude, times = slake_case.conclude, [0]

    def until(*what: Any) -> None:
        times[0] += 1
        if times[0] == 4:  # between the two cases, in the second round
            raise KeyboardInterrupt
        conclude(*what)

    monkeypatch.setattr(slake_case, "conclude", until)
    with pytest.raises(KeyboardInterrupt):
        slake_together.train_all(stopped)
    monkeypatch.setattr(slake_case, "conclude", conclude)
    assert [len(slake_case.resumed(case, {}).sent) for case in stopped] == [2, 1]
    slake_together.train_all(stopped)
    for one, other, seed in zip(whole, stopped, (1, 2), strict=True):
        start = adapters.initial(Path(one.base), 2, 4.0, SETTINGS["targets"], seed)
        assert apart(kept(one), kept(other), start) < 0.1


def test_what_is_trained_is_not_trained_again_and_the_bench_only_asks(
    cases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.benches import slake_clinics

    (case,) = cases("once", ("alternating", 1))
    slake_together.train_all([case])
    first = kept(case)
    monkeypatch.setattr(slake_clinics, "one", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(slake_together, "Together", lambda _: pytest.fail("trained again"))
    slake_together.train_all([case])
    state, facts = slake_case.train(case, slake_case.rows(case)[0])
    assert all(np.allclose(state[name], first[name], atol=1e-3) for name in state) and facts["bytes_up"] > 0


@pytest.mark.parametrize("tune", [False, True])
def test_a_case_whose_factors_are_no_numbers_stops_no_other(
    cases: Any, monkeypatch: pytest.MonkeyPatch, tune: bool
) -> None:
    from scripts.benches.slake_grouped import GroupedModel

    train = GroupedModel.train

    def broken(self: GroupedModel, jobs: Any, *how: Any) -> Any:
        found = train(self, jobs, *how)
        if len(asked) == 1:  # the second round
            found[0] = {name: array * np.float32("nan") for name, array in found[0].items()}
        asked.append(1)
        return found

    asked: list[int] = []
    monkeypatch.setattr(GroupedModel, "train", broken)
    ill, well = (replace(case, tune=tune) for case in cases("ill", ("alternating", 1), ("alternating", 2)))
    slake_together.train_all([ill, well])
    reached = [len(slake_case.resumed(case, kept(case)).sent) for case in (ill, well)]
    assert reached == [1, 3] and all(np.isfinite(array).all() for array in kept(ill).values())
    assert Path(ill.out).exists() is tune and not Path(well.out).exists()


def test_a_rate_that_ends_in_no_number_is_not_trained_again(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.benches.slake_grouped import GroupedModel

    train = GroupedModel.train

    def broken(self: GroupedModel, *how: Any) -> Any:
        first, *others = train(self, *how)
        return [{name: array * np.float32("inf") for name, array in first.items()}, *others]

    monkeypatch.setattr(GroupedModel, "train", broken)
    ill, well = (replace(case, tune=True) for case in cases("rates", ("brief", 1), ("brief", 2)))
    slake_together.train_all([ill, well])
    assert slake_runs.done(ill) and not slake_runs.done(well)
    found = slake_runs.result(ill)
    assert "no longer numbers" in found["failed"] and not any(found["right"].values())
    monkeypatch.setattr(slake_together, "Together", lambda _: pytest.fail("trained again"))
    slake_together.train_all([ill, well])


def test_samples_are_those_of_the_clinics_or_of_the_one_who_trains(cases: Any) -> None:
    federated, pooled, local = cases("samples", ("ffa", 1), ("pooled", 1), ("local mri", 1))
    rows: list[Sample] = slake_case.rows(federated)[0]
    assert {name: len(mine) for name, mine in slake_case.samples_of(federated, rows).items()} == {
        "ct": 9,
        "mri": 4,
        "xray": len(rows) - 13,
    }
    assert slake_case.samples_of(pooled, rows) == {"pooled": rows}
    assert [row.meta["modality"] for row in slake_case.samples_of(local, rows)["local mri"]] == ["MRI"] * 4
