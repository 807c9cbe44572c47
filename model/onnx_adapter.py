"""A PEFT LoRA folder as run-time inputs of the decoder graph: checked against this very base, never merged.

The graph joins q, k and v in one layer: their pairs become one, A side by side and B on the diagonal. Any mixture of
the seven linear layers of the decoder fits; an adapter of projector or tower has no place in these graphs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from model import adapters
from model.adapters import AdapterRejected

_LAYER = re.compile(r"model\.language_model\.layers\.(\d+)\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj")
Pair = tuple[np.ndarray, np.ndarray]  # A (in, rank) and B (rank, out), the scale alpha / rank inside B


def inputs(folder: Path, base_sha256: str, shape: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The graph's LoRA inputs by name. Raises AdapterRejected, before anything is changed.

    `shape`: layers, hidden, heads, kv_heads, width and inner (of the MLP) as in the manifest.
    """
    state, spec = adapters.load(Path(folder))
    if spec.base_sha256 != base_sha256:
        raise AdapterRejected(
            f"The adapter in {folder} was trained on another base model ({spec.base_sha256[:12]}, this one is "
            f"{base_sha256[:12]}); get the adapter for this model or the model for this adapter."
        )
    sizes = _sizes(shape)
    layers: dict[int, dict[str, Pair]] = defaultdict(dict)
    for target in spec.target_modules:
        found = _LAYER.fullmatch(target)
        a, b = (state[f"base_model.model.{target}.lora_{factor}.weight"] for factor in "AB")
        if not found or int(found[1]) >= shape["layers"] or sizes[found[2]] != (a.shape[1], b.shape[0]):
            raise AdapterRejected(f"The adapter in {folder} has no place in this ONNX model for {target}.")
        scaled = b.T.astype(np.float32) * np.float32(spec.alpha / spec.rank)
        layers[int(found[1])][found[2]] = a.T.astype(np.float32), scaled
    arrays: dict[str, np.ndarray] = {}
    for number, pairs in layers.items():
        joined = _joined({part: pairs.pop(part) for part in "qkv" if part in pairs}, sizes)
        for name, pair in {**joined, **pairs}.items():
            for factor, array in zip("AB", pair, strict=True):
                arrays[f"layers.{number}.{name}.lora_{factor}"] = np.ascontiguousarray(array)
    return arrays


def _sizes(shape: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """(in, out) of the seven linear layers."""
    hidden, inner = shape["hidden"], shape["inner"]
    queries, keys = shape["heads"] * shape["width"], shape["kv_heads"] * shape["width"]
    found = {"q": (hidden, queries), "k": (hidden, keys), "v": (hidden, keys), "o": (queries, hidden)}
    return {**found, "gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}


def _joined(pairs: dict[str, Pair], sizes: dict[str, tuple[int, int]]) -> dict[str, Pair]:
    """The pairs of q, k and v as the one pair of the joined layer; nothing where there is none."""
    if not pairs:
        return {}
    rank = sum(a.shape[1] for a, _ in pairs.values())
    b = np.zeros((rank, sum(sizes[part][1] for part in "qkv")), np.float32)
    row = column = 0
    for part in "qkv":
        if part in pairs:
            own = pairs[part][1]
            b[row : row + len(own), column : column + own.shape[1]] = own
            row += len(own)
        column += sizes[part][1]
    return {"qkv": (np.concatenate([a for a, _ in pairs.values()], 1), b)}
