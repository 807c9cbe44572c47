"""The language model of a LLaVA folder as an ONNX graph with a key-value cache: Llama and Mistral decoders.

Inputs: `inputs_embeds` (rows, new, hidden), the cache of every layer `past_key.N`, `past_value.N` (rows, heads, room,
width), `lengths` (rows) int32: cached and new positions of each row less one, `total` (1) int32: the largest such
number plus one, and `places` (any): rows of the flattened (rows * new) positions whose logits are wanted. Outputs:
`logits` (places, vocabulary) and the cache as `present_key.N`, `present_value.N`, which may be the same memory. Rotary
positions follow from the lengths; rows of different length are padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.onnx_graph import CONTRIB, Graph
from model.onnx_source import Source, Unsupported

_KINDS = ("llama", "mistral")
_HEAD_ROWS = 4096  # rows of `lm_head` in one weight of the graph: about as large as a layer's


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder; `theta` is the base of the rotary frequencies and `stretch` divides the positions."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    width: int
    vocabulary: int
    positions: int
    eps: float
    theta: float
    stretch: float


def shape_of(text: dict[str, Any]) -> Shape:
    """Read a text_config; raises Unsupported for a decoder that the graph would not reproduce."""
    kind, act = text.get("model_type"), text.get("hidden_act", "silu")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    positions, window = int(text["max_position_embeddings"]), text.get("sliding_window")
    if kind not in _KINDS or act != "silu":
        raise Unsupported(f"Decoders of type {kind} with {act} have no ONNX graph here; use --backend torch.")
    if rope_type not in ("default", "linear") or rope.get("partial_rotary_factor", 1) != 1:
        raise Unsupported(f"Rotary positions of type {rope_type} have no ONNX graph here; use --backend torch.")
    if window and window < positions:
        raise Unsupported(f"A sliding window of {window} has no ONNX graph here; use --backend torch.")
    heads = int(text["num_attention_heads"])
    return Shape(
        layers=int(text["num_hidden_layers"]),
        hidden=int(text["hidden_size"]),
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        width=int(text.get("head_dim") or text["hidden_size"] // heads),
        vocabulary=int(text["vocab_size"]),
        positions=positions,
        eps=float(text["rms_norm_eps"]),
        theta=float(rope.get("rope_theta", text.get("rope_theta", 10000.0))),
        stretch=float(rope.get("factor", 1.0)) if rope_type == "linear" else 1.0,
    )


def rotary(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (positions, width / 2) of the rotary position embedding."""
    frequencies = 1.0 / shape.theta ** (np.arange(0, shape.width, 2, dtype=np.float64) / shape.width)
    angles = np.outer(np.arange(shape.positions) / shape.stretch, frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def write(graph: Graph, source: Source, shape: Shape, bits: Mapping[str, int], progress: Callable[[int], None]) -> None:
    """Fill `graph` with the decoder, one layer in memory at a time; `progress` gets the parameters done.

    `bits` names the linear layers that do not have the graph's bits: "head" (`lm_head`), "q", "k", "v", "o".
    """
    x = graph.input("inputs_embeds", "float32", ["rows", "new", shape.hidden])
    for name, kind, sizes in (("lengths", "int32", ["rows"]), ("total", "int32", [1]), ("places", "int64", ["places"])):
        graph.input(name, kind, sizes)  # type: ignore[arg-type]
    for name, table in zip(("cosines", "sines"), rotary(shape), strict=True):
        graph.constant(name, table)
    outer = graph.node("Shape", x, start=0, end=2)
    outer = graph.node("Concat", outer, graph.constant("rest", np.array([-1], np.int64)), axis=0)
    graph.constant("flat", np.array([-1, shape.hidden], np.int64))
    graph.constant("flat_heads", np.array([-1, shape.heads * shape.width], np.int64))
    x = graph.node("Reshape", x, "flat")
    gain = graph.constant("layers.0.norm1", source.numpy("text.layers.0.input_layernorm.weight"))
    h = graph.node("SimplifiedLayerNormalization", x, gain, axis=-1, epsilon=shape.eps)
    for number in range(shape.layers):
        h, x = _layer(graph, source, shape, bits, number, h, x, outer)
        progress(source.taken())
    graph.output("logits", "float32", ["places", shape.vocabulary])
    name = "lm_head.weight" if source.has("lm_head.weight") else "text.embed_tokens.weight"
    _head(graph, h, source.torch(name), bits.get("head"))
    progress(source.taken())


def _head(graph: Graph, h: str, weight: Any, bits: int | None) -> None:
    """The logits, in parts: while a graph is loaded its largest weight is in memory twice."""
    parts = [
        graph.linear(h, f"lm_head.{number}", weight[start : start + _HEAD_ROWS], bits=bits)
        for number, start in enumerate(range(0, len(weight), _HEAD_ROWS))
    ]
    graph.node("Concat", *parts, outputs=["logits"], axis=-1)


def _layer(
    graph: Graph, source: Source, shape: Shape, bits: Mapping[str, int], number: int, h: str, x: str, outer: str
) -> tuple[str, str]:
    """One decoder layer: the next layer's normed input and the residual."""
    old, new = f"text.layers.{number}.", f"layers.{number}."
    parts = []
    for part in "qkv":
        pair = source.pair(f"{old}self_attn.{part}_proj")
        y = graph.linear(h, f"{new}{part}", *pair, bits=bits.get(part), lora=True)
        parts.append(graph.node("Reshape", y, outer))
    flat = graph.node("Reshape", _attention(graph, shape, number, parts), "flat_heads")
    last = number + 1 == shape.layers
    if last:  # behind its keys and values, the last layer is computed for the wanted positions alone
        flat, x = (graph.node("Gather", every, "places", axis=0) for every in (flat, x))
    o = graph.linear(flat, f"{new}o", *source.pair(f"{old}self_attn.o_proj"), bits=bits.get("o"), lora=True)
    gain = graph.constant(f"{new}norm2", source.numpy(f"{old}post_attention_layernorm.weight"))
    h, x = _normed(graph, shape, x, o, gain)
    gate = graph.linear(h, f"{new}gate", *source.pair(f"{old}mlp.gate_proj"), lora=True)
    up = graph.linear(h, f"{new}up", *source.pair(f"{old}mlp.up_proj"), lora=True)
    product = graph.node("Mul", graph.node("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)
    down = graph.linear(product, f"{new}down", *source.pair(f"{old}mlp.down_proj"), lora=True)
    name = "text.norm.weight" if last else f"text.layers.{number + 1}.input_layernorm.weight"
    gain = graph.constant("norm" if last else f"layers.{number + 1}.norm1", source.numpy(name))
    return _normed(graph, shape, x, down, gain)


def _normed(graph: Graph, shape: Shape, x: str, change: str, gain: str) -> tuple[str, str]:
    """RMS norm of x + change, and x + change itself."""
    base = f"{change}_sum"
    names = [f"{base}_normed", "", "", base]
    op = "SkipSimplifiedLayerNormalization"
    graph.node(op, x, change, gain, outputs=names, domain=CONTRIB, epsilon=shape.eps)
    return names[0], base


def _attention(graph: Graph, shape: Shape, number: int, parts: list[str]) -> str:
    """Grouped-query attention with rotary positions over the cache of layer `number`."""
    room: list[int | str] = ["rows", shape.kv_heads, "room", shape.width]
    past = [graph.input(f"past_{part}.{number}", "float32", room) for part in ("key", "value")]
    present = [f"present_{part}.{number}" for part in ("key", "value")]
    for name in present:
        graph.output(name, "float32", room)
    inputs = [*parts, *past, "lengths", "total", "cosines", "sines"]
    heads = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
    names = [f"attended.{number}", *present]
    return str(graph.node("GroupQueryAttention", *inputs, outputs=names, domain=CONTRIB, do_rotary=1, **heads)[0])
