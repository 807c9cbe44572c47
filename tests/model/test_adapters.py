"""Adapters: what is written is read back bit for bit, anything else is refused, one pointer decides what is in use."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import adapters, installed
from model.adapters import AdapterRejected

BASE = "ab" * 32


def small(rank: int = 2, seed: int = 0) -> tuple[adapters.State, adapters.AdapterSpec]:
    draw = np.random.default_rng(seed)
    state = {}
    for layer in ("q_proj", "v_proj"):
        name = f"base_model.model.model.language_model.layers.0.self_attn.{layer}"
        state[f"{name}.lora_A.weight"] = draw.normal(size=(rank, 6)).astype(np.float32)
        state[f"{name}.lora_B.weight"] = draw.normal(size=(4, rank)).astype(np.float32)
    return state, adapters.spec_of(state, 4.0, BASE)


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), alpha=st.sampled_from([1.0, 2.5, 16.0]))
def test_saved_is_loaded_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, rank: int, seed: int, alpha: float
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    state, spec = small(rank, seed)
    spec = replace(spec, alpha=alpha)
    adapters.save(folder, state, spec)
    again, found = adapters.load(folder)
    assert found == spec
    assert all(np.array_equal(again[name], state[name]) for name in spec.names)
    adapters.save(folder / "copy", again, found)
    assert adapters.sha256(folder / "copy") == adapters.sha256(folder)


def test_every_byte_counts_in_the_hash(tmp_path: Path) -> None:
    state, spec = small()
    adapters.save(tmp_path, state, spec)
    before = adapters.sha256(tmp_path)
    file = tmp_path / adapters.WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert adapters.sha256(tmp_path) != before


def broken() -> dict[str, adapters.State]:
    state, spec = small()
    first = spec.names[0]
    nan = {**state, first: np.full_like(state[first], np.nan)}
    return {
        "unexpected": {**state, "base_model.model.x.lora_A.weight": np.zeros((2, 2), np.float32)},
        "lacks": {name: array for name, array in state.items() if name != first},
        "shape": {**state, first: state[first][:, :-1]},
        "dtype": {**state, first: state[first].astype(np.float64)},
        "finite": nan,
    }


@pytest.mark.parametrize("kind", broken())
def test_arrays_other_than_promised_are_refused_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    _, spec = small()
    with pytest.raises(AdapterRejected, match=kind):
        adapters.check(broken()[kind], spec)
    with pytest.raises(AdapterRejected):
        adapters.save(tmp_path / "out", broken()[kind], spec)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1])
def test_truncated_weights_are_refused(tmp_path: Path, cut: int) -> None:
    adapters.save(tmp_path, *small())
    file = tmp_path / adapters.WEIGHTS
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(AdapterRejected):
        adapters.load(tmp_path)


def test_header_that_claims_a_gigabyte_is_refused(tmp_path: Path) -> None:
    adapters.save(tmp_path, *small())
    file = tmp_path / adapters.WEIGHTS
    file.write_bytes((1 << 30).to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(AdapterRejected, match="truncated"):
        adapters.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 3),
        ("lora_alpha", "x"),
        ("target_modules", ["lm_head"]),
        ("peft_type", "LOHA"),
        ("base_model_name_or_path", ""),
    ],
)
def test_configuration_that_does_not_fit_the_weights_is_refused(tmp_path: Path, key: str, value: object) -> None:
    adapters.save(tmp_path, *small())
    file = tmp_path / adapters.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(AdapterRejected):
        adapters.load(tmp_path)


@pytest.mark.parametrize("name", ["w", "base_model.model..lora_A.weight", "base_model.model.a/../b.lora_A.weight", ""])
def test_other_names_are_no_factors(name: str) -> None:
    with pytest.raises(AdapterRejected):
        adapters.factor(name)
    with pytest.raises(AdapterRejected):
        adapters.module(name)


def test_initial_starts_without_effect_and_depends_on_the_seed_only(tiny: Path) -> None:
    one = adapters.initial(tiny, 4, 8, "decoder", 7)
    two = adapters.initial(tiny, 4, 8, "decoder", 7)
    other = adapters.initial(tiny, 4, 8, "decoder", 8)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert any(not np.array_equal(one[name], other[name]) for name in one)
    assert all(not array.any() for name, array in one.items() if adapters.factor(name) == "B")
    assert len(one) == 2 * 2 * 7  # two layers of the tiny decoder, seven linear layers each, A and B
    whole = adapters.initial(tiny, 4, 8, "decoder+projector+tower", 7)
    assert len(whole) == 2 * (2 * 7 + 2 + 2 * 6)


def test_targets_that_match_nothing_are_refused(tiny: Path) -> None:
    with pytest.raises(AdapterRejected, match="matches the targets"):
        adapters.initial(tiny, 4, 8, r"no\.such\.layer", 0)


def test_installed_adapter_is_current_and_can_be_taken_back(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert adapters.current(home) is None
    names = []
    for seed in (1, 2):
        folder = tmp_path / f"release-{seed}"
        adapters.save(folder, *small(seed=seed))
        names.append(adapters.install(home, folder, evidence={"round": seed, "accepted": ["a"]}))
    assert adapters.current(home) == home / "adapters" / names[1]
    assert adapters.sha256(home / "adapters" / names[1]) == adapters.sha256(tmp_path / "release-2")
    record = installed.pointer(home)
    assert record is not None and record["round"] == 2 and record["base_sha256"] == BASE
    assert json.loads((home / "adapters" / names[1] / adapters.RELEASE).read_text())["accepted"] == ["a"]
    assert adapters.rollback(home) == names[0]
    assert adapters.current(home) == home / "adapters" / names[0]
    assert adapters.rollback(home) is None
    assert adapters.current(home) is None


def test_refused_install_leaves_the_old_adapter(tmp_path: Path) -> None:
    home = tmp_path / "home"
    adapters.save(tmp_path / "good", *small(seed=1))
    name = adapters.install(home, tmp_path / "good", evidence={"round": 1})
    adapters.save(tmp_path / "bad", *small(seed=2))
    (tmp_path / "bad" / adapters.WEIGHTS).write_bytes(b"")
    with pytest.raises(AdapterRejected):
        adapters.install(home, tmp_path / "bad", evidence={"round": 2})
    assert adapters.current(home) == home / "adapters" / name
    assert sorted(p.name for p in (home / "adapters").iterdir()) == [installed.POINTER, name]


def test_changed_files_or_pointer_are_noticed_and_rollback_still_works(tmp_path: Path) -> None:
    home = tmp_path / "home"
    adapters.save(tmp_path / "good", *small(seed=1))
    name = adapters.install(home, tmp_path / "good", evidence={"round": 1})
    file = home / "adapters" / name / adapters.WEIGHTS
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(AdapterRejected, match="not what was installed"):
        adapters.current(home)
    for damage in ("{", "[]", json.dumps({"name": "../../etc", "sha256": "", "base_sha256": "", "round": 1})):
        (home / "adapters" / installed.POINTER).write_text(damage)
        with pytest.raises(AdapterRejected, match="rollback"):
            adapters.current(home)
    assert adapters.rollback(home) is None
    assert adapters.current(home) is None
