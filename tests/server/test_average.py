"""A release that is the mean of the last rounds: which rounds, and where it says so."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from model import adapters, passport
from server import checkpoint as store
from server import release
from tests.server.examined import Clinics, record, run


def test_a_release_can_be_the_mean_of_the_last_rounds_and_says_so(tmp_path: Path, tiny: Path) -> None:
    last = run(tmp_path, tiny, Clinics({}), num_server_rounds=4, average=3)
    kept = [store.load(tmp_path / f"rounds/round-{number:05d}").state for number in (2, 3, 4)]
    folder = tmp_path / "rounds/releases/round-00004"
    found, _ = adapters.load(folder)
    for name, array in found.items():
        assert np.allclose(array, np.mean([state[name] for state in kept], axis=0), atol=1e-3)
    assert any(not np.array_equal(found[name], array) for name, array in last.state.items())
    assert (
        record(tmp_path, 4)["averaged"] == json.loads((folder / adapters.RELEASE).read_bytes())["averaged"] == [4, 3, 2]
    )
    assert "the factors after rounds 2, 3, 4" in (folder / passport.TEXT).read_text()


def test_a_mean_leaves_out_rounds_that_changed_nothing_or_are_damaged(tmp_path: Path, tiny: Path) -> None:
    last = run(tmp_path, tiny, Clinics({}), num_server_rounds=3, gate="off")
    unchanged = dataclasses.replace(last, round=4, changed=False)
    store.save(tmp_path / "rounds", unchanged)
    (tmp_path / "rounds/round-00002/adapter_model.safetensors").write_bytes(b"damaged")
    state, numbers = release.averaged(tmp_path / "rounds", unchanged, 5)
    kept = [store.load(tmp_path / f"rounds/round-{number:05d}").state for number in (1, 3)]
    assert numbers == [3, 1]
    assert all(np.allclose(state[n], (kept[0][n] + kept[1][n]) / 2, atol=1e-6) for n in state)
    assert release.averaged(tmp_path / "elsewhere", last, 5) == (last.state, [3])
