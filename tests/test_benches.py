"""The parts of the benches that compute and print; what they measure is run by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest

from model import adapters, phantoms, wire
from scripts.benches import aggregation, edge, edge_gpu, simulation, slake, slake_case, slake_runs, slake_table


def test_divergence_is_zero_for_equal_logits_and_known_for_two() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 50))
    assert edge.divergence(logits, logits + 2.0) == pytest.approx(0.0, abs=1e-12)
    p, q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    exact = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert edge.divergence(np.log(p), np.log(q)) == pytest.approx(exact)
    assert edge.divergence(np.log(p), np.log(np.hstack([q, [[9.0]]]))) == pytest.approx(exact), "more columns"


def test_the_gpu_table_shows_factors_and_names_what_failed() -> None:
    speeds = {"ours": {"tokens_per_second": 100.0, "first_token_seconds": 0.1}}
    speeds["transformers"] = {"tokens_per_second": 50.0, "first_token_seconds": 0.2}
    memory = {
        "static_gib": 1.0,
        "peak_gib": 1.1,
        "warm_peak_gib": 1.2,
        "open_seconds": 3.0,
        "first_answer_seconds": 1.0,
    }
    report: dict[str, Any] = {"device": "GPU", "torch": "2", "new": 64, "pairs": {"small": speeds}}
    report |= {"memory": {"small": memory}, "doctors": {"small": {"failed": "out of memory"}}}
    text = edge_gpu.table(report)
    assert "| small | 50.0 | 100.0 | 2.0x | 0.200 | 0.100 |" in text
    assert "| small | 1.00 | 1.20 |" in text and "Not measured: doctors, small." in text


def test_a_share_of_the_simulated_clinics_is_there_each_round() -> None:
    nodes = [SimpleNamespace(node_id=n) for n in range(50)]
    grid = simulation.SomeThere(SimpleNamespace(get_nodes=lambda: nodes, run="x"), 0.2)
    first, second = ({node.node_id for node in grid.get_nodes()} for _ in range(2))
    assert len(first) == len(second) == 10 and first != second and grid.run == "x"
    rows = [
        {"seconds": s, "accepted": 9, "rejected": 1, "bytes_up": 9 * 2048, "rss_mib": 100 + s} for s in (3.0, 1.0, 2.0)
    ]
    assert "| 50 | 10 | 9 | 2.0 | 2 | 103, 102 |" in simulation.table({"clinics": {"50": rows}})


def test_an_aggregation_case_at_true_size(tmp_path: Path) -> None:
    found = aggregation.case(tmp_path, "tinyllava-1.5b", 1, "alternating", 3)
    assert found["arrays"] == 2 * 7 * 22
    assert found["relative_error"] < 1e-6
    assert 0.4 < found["up"] / found["down"] < 0.6
    assert "| alternating | 3 |" in aggregation.table({"preset": "x", "rank": 1, "cases": [found]})


def test_the_share_of_what_pooling_gains_is_known_for_a_known_case() -> None:
    groups = [str(n // 4) for n in range(400)]
    pooled = np.array([0.0, 0.0, 0.0, 1.0] * 100)
    found = slake_table.share(pooled * 0.8, pooled, groups)
    assert found["points"] == pytest.approx(20.0) and found["share"] == pytest.approx(0.8)
    assert found["share_low"] == pytest.approx(0.8) and found["share_high"] == pytest.approx(0.8), "every image alike"
    nothing = slake_table.share(pooled * 0, pooled * 0.01, groups)
    assert nothing["share"] is None, "a share of a quarter of a point means nothing"


def test_every_case_of_the_slake_study_has_a_name_of_its_own(tmp_path: Path) -> None:
    wanted = list(
        slake.cases(
            tmp_path, tmp_path, tmp_path, 2, {"batch": 24}, {"brief": {"lr": 1e-3}, "alternating": {"lr": 2e-3}}
        )
    )
    names = [case.name for case in wanted]
    assert len(names) == len(set(names)) == 1 + 2 * (2 + 2 * (4 + 3))
    assert names[:4] == ["none", "pooled-1", "brief-1", "alternating-modality-1"] and "local-head-organ-2" in names
    assert [case.settings.get("lr") for case in wanted[1:5]] == [None, 1e-3, 2e-3, None]
    assert [case.settings["batch"] for case in wanted[1:4]] == [72, 24, 24]
    assert next(case for case in wanted if case.name == "local-ct-modality-1").settings["lr"] == 1e-3
    assert not any(slake_runs.done(case) for case in wanted)
    (tmp_path / "cases").mkdir()
    Path(wanted[1].out).write_text('{"settings": {"rounds": 3}, "base": "", "data": ""}', encoding="utf-8")
    with pytest.raises(click.ClickException, match="other settings"):
        slake_runs.done(wanted[1])


def test_a_federated_case_of_the_slake_study_moves_both_factors(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        **slake.SETTINGS,
        "lr": 4e-3,
        "lr_ratio": 2.0,
        "lr_final": 0.5,
        "targets": "decoder",
        "rank": 2,
        "batch": 4,
        "rounds": 2,
        "steps": 2,
    }
    drawn = phantoms.make(3, ["plain"], seed=1, size=48)
    kinds = dict(zip(sorted({row.group for row in drawn}), ("CT", "MRI", "X-Ray"), strict=True))
    samples = [replace(row, meta={**row.meta, "modality": kinds[row.group]}) for row in drawn]
    case = slake_case.Case("alternating", "modality", 1, str(tiny), "", str(tmp_path / "x.json"), settings)
    state, facts = slake_case.train(case, samples)
    start = wire.rounded(adapters.initial(tiny, 2, 16.0, "decoder", 1))
    assert all(not np.array_equal(state[name], start[name]) for name in state)
    assert 2 * facts["bytes_up"] == pytest.approx(wire.packed_bytes(start), rel=0.5) and facts["distance"] < 1e-5
