"""An adapter on the wire: cut into vectors and put together again bit for bit; what was not promised is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import adapters, wire
from model.adapters import AdapterRejected


def state_of(rank: int, seed: int, layers: int = 3) -> adapters.State:
    draw = np.random.default_rng(seed)
    state = {}
    for layer in range(layers):
        out, inside = (int(n) for n in draw.integers(1, 9, 2))
        name = f"base_model.model.model.layers.{layer}.q_proj"
        state[f"{name}.lora_A.weight"] = draw.normal(size=(rank, inside)).astype(np.float32)
        state[f"{name}.lora_B.weight"] = draw.normal(size=(out, rank)).astype(np.float32)
    return state


def sent(vector: np.ndarray, **changes: object) -> SimpleNamespace:
    """An entry of an array record, as Flower has it."""
    import io

    data = io.BytesIO()
    np.save(data, vector)
    values = {"shape": vector.shape, "dtype": str(vector.dtype), "stype": "numpy.ndarray", "data": data.getvalue()}
    return SimpleNamespace(**{**values, **changes})


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_what_is_packed_is_unpacked_bit_for_bit(rank: int, seed: int, layers: int) -> None:
    state = state_of(rank, seed, layers)
    shapes = wire.read_layout(wire.layout(adapters.spec_of(state, 8.0, "0" * 64)))
    assert shapes == {name: array.shape for name, array in state.items()}
    record = {wire.key(f): sent(wire.pack(state, f)) for f in wire.FACTORS}
    again = wire.unpack(record, shapes)
    assert set(again) == set(state) and all(np.array_equal(again[name], state[name]) for name in state)
    half = wire.unpack({"lora_B": record["lora_B"]}, shapes, ("B",))
    assert set(half) == {name for name in state if adapters.factor(name) == "B"}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_rounded_values_travel_in_half_the_bytes_and_arrive_bit_for_bit(seed: int, spread: float) -> None:
    exact = {name: array * np.float32(spread) for name, array in state_of(2, seed).items()}
    state = wire.rounded(exact)
    again = wire.rounded(state)
    for name, array in state.items():
        assert array.dtype == np.float32 and np.array_equal(again[name], array)
        assert np.allclose(array, exact[name], rtol=2**-11, atol=2**-24)
    assert wire.packed_bytes(state) * 2 == adapters.state_bytes(state)
    vectors = {wire.key(f): wire.pack(state, f) for f in wire.FACTORS}
    assert {str(vector.dtype) for vector in vectors.values()} == {"float16"}
    shapes = {name: array.shape for name, array in state.items()}
    arrived = wire.unpack({key: sent(vector) for key, vector in vectors.items()}, shapes)
    assert all(arrived[n].dtype == np.float32 and np.array_equal(arrived[n], state[n]) for n in state)
    assert wire.arrived_bytes({key: sent(vector) for key, vector in vectors.items()}) == wire.packed_bytes(state)
    whole = {key: sent(vector.astype(np.float32)) for key, vector in vectors.items()}
    assert wire.arrived_bytes(whole) == 2 * wire.packed_bytes(state)  # as it came, not as it could have come


def test_what_16_bits_cannot_hold_is_refused_by_the_sender() -> None:
    with pytest.raises(AdapterRejected, match="16 bits"):
        wire.rounded({"a.lora_A.weight": np.full((1, 1), 7e4, np.float32)})


def test_a_vector_that_is_not_what_was_promised_is_refused() -> None:
    state = state_of(2, 0)
    shapes = {name: array.shape for name, array in state.items()}
    vector = wire.pack(state, "B")
    nan = vector.copy()
    nan[-1] = np.nan
    bad = {
        "keys": {"lora_B": sent(vector), "more": sent(vector)},
        "lora_A": {"lora_A": sent(wire.pack(state, "A"))},
        "declared": {"lora_B": sent(vector[:-1])},
        "float64": {"lora_B": sent(vector.astype(np.float64))},
        "npy": {"lora_B": sent(vector, data=b"")},
        "bytes": {"lora_B": sent(vector, data=sent(vector).data[:-4])},
        "non-finite": {"lora_B": sent(nan)},
        "dtype": {"lora_B": sent(vector, data=sent(vector.astype(">f4")).data)},
    }
    for word, record in bad.items():
        with pytest.raises(AdapterRejected, match=word):
            wire.unpack(record, shapes, ("B",))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", json.dumps({"rank": 1}), json.dumps({"rank": 1, "modules": [["a", 1]]})]
)
def test_a_layout_that_is_not_readable_is_refused(text: str) -> None:
    with pytest.raises(AdapterRejected, match="layout"):
        wire.read_layout(text)
