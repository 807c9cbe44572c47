"""An adapter on the wire: one vector for each factor, and a layout that says how to cut it into arrays again.

Flower moves every array as objects of its own, several calls each; a hundred small arrays cost the server half a minute
of processor time a round, two vectors cost none. Values travel in 16 bits (IEEE half precision, an error of at most
1/2048 of a value): both sides round first (`rounded`), so that what is sent is exactly what both go on with. Whatever
arrives is held against the expected length before a byte is decoded. Knows nothing of Flower, so that server and
clinics share it.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from model import adapters
from model.adapters import AdapterRejected, AdapterSpec, State
from model.npy import read_exact

DTYPES = ("float16", "float32")  # 32 bits only for an adapter that was released before values were rounded
FACTORS = ("A", "B")
MAX_MODULES = 10_000  # layers with an adapter
MAX_VALUES = 200_000_000  # values of one adapter: rank 64 on a 7B model has 160 million


def key(factor: str) -> str:
    """Name of a factor's vector in a message."""
    return f"lora_{factor}"


def layout(spec: AdapterSpec) -> str:
    """Rank and layers of an adapter as JSON: {"rank": r, "modules": [[name, out, in], ...]}, in their order."""
    shapes = dict(zip(spec.names, spec.shapes, strict=True))
    rows = []
    for module in spec.target_modules:
        out, inside = (shapes[_name(module, f)][0 if f == "B" else 1] for f in ("B", "A"))
        rows.append([module, out, inside])
    return json.dumps({"rank": spec.rank, "modules": rows})


def read_layout(text: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array of a layout that came from elsewhere. Raises AdapterRejected."""
    try:
        found = json.loads(text)
        rank, rows = found["rank"], found["modules"]
        sizes = [(str(name), int(out), int(inside)) for name, out, inside in rows]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise AdapterRejected("the layout of the adapter is not readable") from error
    if type(rank) is not int or rank < 1 or not 0 < len(sizes) <= MAX_MODULES:
        raise AdapterRejected(f"the layout names rank {rank} and {len(sizes)} layers")
    shapes: dict[str, tuple[int, ...]] = {}
    for module, out, inside in sizes:
        if out < 1 or inside < 1:
            raise AdapterRejected(f"the layout gives {module[:120]} the sizes {out} and {inside}")
        shapes |= {_name(module, "A"): (rank, inside), _name(module, "B"): (out, rank)}
    if len(shapes) != 2 * len(sizes) or any(adapters.factor(name) not in FACTORS for name in shapes):
        raise AdapterRejected("the layout names a layer twice")
    if sum(a * b for a, b in shapes.values()) > MAX_VALUES:
        raise AdapterRejected(f"the adapter has more than {MAX_VALUES} values")
    return shapes


def _name(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def rounded(state: Mapping[str, np.ndarray]) -> State:
    """The arrays with every value rounded to what 16 bits hold, as float32. Raises AdapterRejected beyond 65,504."""
    found = {}
    with np.errstate(over="ignore"):
        for name, array in state.items():
            found[name] = array.astype(np.float16).astype(np.float32)
            if not np.isfinite(found[name]).all():
                raise AdapterRejected(f"{name} holds values that 16 bits cannot hold.")
    return found


def pack(state: Mapping[str, np.ndarray], factor: str) -> np.ndarray:
    """All arrays of one factor as one vector, in the order of their names: float16 where that loses nothing."""
    whole = np.concatenate([state[name].ravel() for name in sorted(state) if adapters.factor(name) == factor])
    with np.errstate(over="ignore"):
        half = whole.astype(np.float16)
    return half if np.array_equal(half, whole) else whole


def packed_bytes(state: Mapping[str, np.ndarray], factors: str = "AB") -> int:
    """Bytes of these factors on the wire, without the envelope."""
    return sum(pack(state, factor).nbytes for factor in factors)


def arrived_bytes(record: Mapping[str, Any]) -> int:
    """Bytes of a message's vectors as they came, without the envelope; the record has passed `unpack`."""
    return sum(int(np.prod(sent.shape)) * np.dtype(sent.dtype).itemsize for sent in record.values())


def unpack(
    record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: tuple[str, ...] = FACTORS
) -> State:
    """Arrays (float32) of these factors from a message's array record (entries with shape, dtype, stype and data).

    The record must hold exactly those vectors, of exactly the expected length, in one of `DTYPES`. Raises
    AdapterRejected.
    """
    if set(record) != {key(factor) for factor in factors}:
        odd = sorted(set(record) ^ {key(factor) for factor in factors})
        raise AdapterRejected(f"{len(odd)} array keys are missing or unexpected, the first is {odd[0][:120]!r}")
    state: State = {}
    for factor in factors:
        names = sorted(name for name in shapes if adapters.factor(name) == factor)
        length = (sum(int(np.prod(shapes[name])) for name in names),)
        sent = record[key(factor)]
        declared = (tuple(sent.shape), sent.dtype, sent.stype)
        if declared not in [(length, dtype, "numpy.ndarray") for dtype in DTYPES]:
            raise AdapterRejected(
                f"{key(factor)} is declared with shape and dtype {declared}, expected {length} {DTYPES[0]}"
            )
        try:
            vector = read_exact(sent.data, length, sent.dtype).astype(np.float32)
        except AdapterRejected as error:
            raise AdapterRejected(f"{key(factor)}: {error}") from error
        if not np.isfinite(vector).all():
            raise AdapterRejected(f"{key(factor)} holds non-finite values")
        ends = np.cumsum([int(np.prod(shapes[name])) for name in names])[:-1]
        parts = np.split(vector, ends)
        state |= {name: part.reshape(shapes[name]) for name, part in zip(names, parts, strict=True)}
    return state
