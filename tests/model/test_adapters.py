"""Adapters: what is written is read back bit for bit, anything else is refused, one pointer decides what is in use."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import adapters, installed, passport
from model.adapters import AdapterRejected
from tests.model.signed import TRAPS, adapter, at_once, pipe, put

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


def test_targets_that_are_no_expression_are_refused(tiny: Path) -> None:
    with pytest.raises(adapters.AdapterRejected, match=r"are no expression .* try decoder"):
        adapters.initial(tiny, 2, 8.0, "decoder(", 0)


@pytest.mark.parametrize("number", [-1, 10**18, "3", 1.5, None, True])
def test_a_round_that_cannot_be_changes_nothing(tmp_path: Path, number: object) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    adapters.save(tmp_path / "a", *small())
    first = adapters.install(home, tmp_path / "a", evidence={"round": 1})
    with pytest.raises(adapters.AdapterRejected, match="round of a release"):
        adapters.install(home, tmp_path / "a", evidence={"round": number})
    assert [path.name for path in (home / "adapters").glob("round-*")] == [first]
    now = adapters.current(home)
    assert now is not None and now.name == first


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


@pytest.mark.parametrize("file", [adapters.CONFIG, adapters.WEIGHTS])
@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_in_an_adapter_folder_is_refused_at_once(
    tmp_path: Path, trap: Callable[[Path], None], file: str
) -> None:
    place = put(tmp_path / "home", adapter(tmp_path / "a"), None)
    trap(place / file)
    for call in (adapters.load, adapters.sha256):
        with pytest.raises(AdapterRejected, match=f"not a readable adapter folder .{file} is"):
            at_once(lambda call=call: call(place))
    with pytest.raises(AdapterRejected):
        at_once(lambda: adapters.current(tmp_path / "home"))
    assert f"{file} is" in (at_once(lambda: installed.listing(tmp_path / "home"))[0].problem or "")


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_in_place_of_the_pointer_is_refused_at_once_and_rollback_removes_it(
    tmp_path: Path, trap: Callable[[Path], None]
) -> None:
    home = tmp_path / "home"
    place = put(home, adapter(tmp_path / "a"), None)
    for to in (place.name, None):
        trap(home / "adapters" / installed.POINTER)
        with pytest.raises(AdapterRejected, match="afya-client rollback"):
            at_once(lambda: adapters.current(home))
        assert at_once(lambda to=to: adapters.rollback(home, to)) == to
        assert adapters.current(home) == (place if to else None)


def test_a_folder_that_is_a_link_is_no_adapter(tmp_path: Path) -> None:
    home = tmp_path / "home"
    place = put(home, adapter(tmp_path / "a"), None)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterRejected, match="is a link"):
        adapters.current(home)
    with pytest.raises(AdapterRejected, match="is a link"):
        adapters.rollback(home, place.name)
    before = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    assert put(home, tmp_path / "a", None) == place and adapters.current(home) == place and not place.is_symlink()
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == before


def test_a_pointer_or_a_note_of_any_other_kind_is_refused_in_a_sentence(tmp_path: Path) -> None:
    home = tmp_path / "home"
    place = put(home, adapter(tmp_path / "a"), None)
    good = json.loads((home / "adapters" / installed.POINTER).read_text())
    bad = {"name": ["..", "", f"round-0001-{'0' * 12}", 7], "sha256": [None, "x"], "round": ["1", None]}
    bad |= {"previous": ["../..", "\x1b[2J"], "installed_at": ["\x1b[2J", None], "base_sha256": ["", {}]}
    texts = [json.dumps({**good, entry: value}) for entry, values in bad.items() for value in values]
    texts += [json.dumps({key: good[key] for key in good if key != entry}) for entry in good if entry != "previous"]
    for text in [*texts, "[" * 60_000, "7", '"x"', "null"]:
        (home / "adapters" / installed.POINTER).write_text(text)
        with pytest.raises(AdapterRejected, match="rollback"):
            adapters.current(home)
    (home / "adapters" / installed.POINTER).write_text(json.dumps(good))
    (home / "adapters" / "round-\x1b[2J").mkdir()
    for text in ("[]", '{"round": null}', "[" * 60_000, "{"):
        (place / adapters.RELEASE).write_text(text)
        assert [(row.name, row.round, row.problem) for row in installed.listing(home)] == [
            (place.name, good["round"], passport.UNSIGNED)
        ]
    pipe(place / adapters.RELEASE)  # nobody reads that file to go back
    assert at_once(lambda: installed.listing(home))[0].problem == passport.UNSIGNED
    assert at_once(lambda: installed.rollback(home, place.name)) == place.name


def test_rollback_goes_to_no_adapter_whose_files_were_changed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = put(home, adapter(tmp_path / "a"), None)
    second = put(home, adapter(tmp_path / "b", 0.2), None)
    (first / adapters.WEIGHTS).write_bytes((second / adapters.WEIGHTS).read_bytes())
    with pytest.raises(AdapterRejected, match="not what was installed"):
        adapters.rollback(home)
    assert adapters.current(home) == second
