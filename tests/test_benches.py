"""The parts of the benches that compute and print; what they measure is run by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scripts.benches import aggregation, edge, edge_gpu, simulation


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
