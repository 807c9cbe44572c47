"""Replies that wait on the disk: the same arrays, the same aggregate, nothing left behind."""

from pathlib import Path

import numpy as np

from server.aggregate import combine
from server.spool import Spool
from tests.server.fakes import small_state


def test_arrays_from_the_disk_are_the_same_and_go_away(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "incoming")
    states = [small_state(seed=seed) for seed in range(3)]
    mapped = [spool.put(node, state) for node, state in enumerate(states)]
    for state, found in zip(states, mapped, strict=True):
        assert set(found) == set(state)
        assert all(np.array_equal(found[name], state[name]) for name in state)
    weights = [0.5, 0.25, 0.25]
    memory, _ = combine("factor-average", states[0], states, weights)
    disk, _ = combine("factor-average", states[0], mapped, weights)
    assert all(np.array_equal(memory[name], disk[name]) for name in memory)
    spool.clear()
    assert not list((tmp_path / "incoming").iterdir())


def test_one_factor_alone(tmp_path: Path) -> None:
    state = {name: array for name, array in small_state().items() if name.endswith("lora_B.weight")}
    found = Spool(tmp_path / "in").put(7, state)
    assert set(found) == set(state) and [path.name for path in (tmp_path / "in").iterdir()] == ["7-B.npy"]
