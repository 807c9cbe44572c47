"""A PEFT LoRA folder as run-time inputs of the decoder graph: checked against this very base, never merged.

Any mixture of the seven linear layers of the decoder fits; an adapter of projector or tower has no place in these
graphs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from model import adapters
from model.adapters import AdapterRejected

_LAYER = re.compile(r"model\.language_model\.layers\.(\d+)\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj")


def inputs(folder: Path, base_sha256: str, shape: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The graph's LoRA inputs by name: A (in, rank), and B (rank, out) times alpha / rank. Raises AdapterRejected.

    `shape`: layers, hidden, heads, kv_heads, width and inner (of the MLP) as in the manifest.
    """
    state, spec = adapters.load(Path(folder))
    if spec.base_sha256 != base_sha256:
        raise AdapterRejected(
            f"The adapter in {folder} was trained on another base model ({spec.base_sha256[:12]}, this one is "
            f"{base_sha256[:12]}); get the adapter for this model or the model for this adapter."
        )
    sizes = _sizes(shape)
    arrays: dict[str, np.ndarray] = {}
    for target in spec.target_modules:
        found = _LAYER.fullmatch(target)
        a, b = (state[f"base_model.model.{target}.lora_{factor}.weight"] for factor in "AB")
        if not found or int(found[1]) >= shape["layers"] or sizes[found[2]] != (a.shape[1], b.shape[0]):
            raise AdapterRejected(f"The adapter in {folder} has no place in this ONNX model for {target}.")
        scaled = b.T.astype(np.float32) * np.float32(spec.alpha / spec.rank)
        for factor, array in (("A", a.T.astype(np.float32)), ("B", scaled)):
            arrays[f"layers.{found[1]}.{found[2]}.lora_{factor}"] = np.ascontiguousarray(array)
    return arrays


def _sizes(shape: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """(in, out) of the seven linear layers."""
    hidden, inner = shape["hidden"], shape["inner"]
    queries, keys = shape["heads"] * shape["width"], shape["kv_heads"] * shape["width"]
    found = {"q": (hidden, queries), "k": (hidden, keys), "v": (hidden, keys), "o": (queries, hidden)}
    return {**found, "gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
