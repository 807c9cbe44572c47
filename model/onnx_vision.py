"""Vision tower and projector of a LLaVA folder as one ONNX graph: CLIP and SigLIP towers.

Input `pixel_values` (pictures, 3, side, side) float32, output `features` (pictures, tokens, hidden): what takes the
place of the image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from model.onnx_graph import CONTRIB, Graph
from model.onnx_source import Source, Unsupported

_KINDS = ("clip_vision_model", "siglip_vision_model")
_ACTS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")


def check(config: dict[str, Any]) -> None:
    """Raise Unsupported for a tower or projector that the graph would not reproduce."""
    vision = config["vision_config"]
    kind, acts = vision["model_type"], {vision["hidden_act"], config["projector_hidden_act"]}
    if kind not in _KINDS or acts - set(_ACTS):
        raise Unsupported(f"Vision towers of type {kind} ({', '.join(sorted(acts))}) have no ONNX graph here.")
    if not isinstance(config["vision_feature_layer"], int):
        raise Unsupported("Features of several vision layers have no ONNX graph here; use --backend torch.")


def tokens(config: dict[str, Any]) -> int:
    """Number of tokens that one picture becomes."""
    vision = config["vision_config"]
    patches = int(vision["image_size"] // vision["patch_size"]) ** 2
    marked = vision["model_type"] == "clip_vision_model"
    return patches + int(marked) - int(config["vision_feature_select_strategy"] == "default")


def write(graph: Graph, source: Source, config: dict[str, Any], progress: Callable[[int], None]) -> None:
    """Fill `graph` with the tower up to the chosen layer, and the projector."""
    vision, hidden = config["vision_config"], config["text_config"]["hidden_size"]
    side, chosen = vision["image_size"], config["vision_feature_layer"]
    graph.input("pixel_values", "float32", ["pictures", vision["num_channels"], side, side])
    x = _embedded(graph, source, vision)
    if source.has("tower.pre_layrnorm.weight"):
        x = _norm(graph, source, vision, x, "pre_layrnorm")
    layers = chosen if chosen >= 0 else vision["num_hidden_layers"] + 1 + chosen
    for number in range(layers):
        x = _layer(graph, source, vision, number, x)
        progress(source.taken())
    if config["vision_feature_select_strategy"] == "default":
        ends = [graph.constant(f"cut.{n}", np.array([v], np.int64)) for n, v in enumerate((1, 2**31, 1))]
        x = graph.node("Slice", x, *ends)
    x = graph.linear(x, "projector.1", *source.pair("projector.linear_1"))
    x = _act(graph, x, config["projector_hidden_act"])
    x = graph.linear(x, "projector.2", *source.pair("projector.linear_2"))
    graph.node("Identity", x, outputs=["features"])
    graph.output("features", "float32", ["pictures", tokens(config), hidden])
    progress(source.taken())


def _embedded(graph: Graph, source: Source, vision: dict[str, Any]) -> str:
    """Patches with their positions (pictures, patches, width), a class token in front where the tower has one."""
    patch, width = vision["patch_size"], vision["hidden_size"]
    inputs = ["pixel_values", graph.constant("patch", source.numpy("tower.embeddings.patch_embedding.weight"))]
    if source.has("tower.embeddings.patch_embedding.bias"):
        inputs.append(graph.constant("patch.bias", source.numpy("tower.embeddings.patch_embedding.bias")))
    x = graph.node("Conv", *inputs, kernel_shape=[patch, patch], strides=[patch, patch])
    x = graph.node("Reshape", x, graph.constant("grid", np.array([0, width, -1], np.int64)))
    x = graph.node("Transpose", x, perm=[0, 2, 1])
    if source.has("tower.embeddings.class_embedding"):
        mark = graph.constant("class", source.numpy("tower.embeddings.class_embedding").reshape(1, 1, width))
        shape = graph.node("Shape", "pixel_values", start=0, end=1)
        shape = graph.node("Concat", shape, graph.constant("one", np.array([1, width], np.int64)), axis=0)
        x = graph.node("Concat", graph.node("Expand", mark, shape), x, axis=1)
    return str(graph.node("Add", x, graph.constant("positions", _positions(source))))


def _positions(source: Source) -> np.ndarray:
    return source.numpy("tower.embeddings.position_embedding.weight")[None]


def _norm(graph: Graph, source: Source, vision: dict[str, Any], x: str, name: str) -> str:
    parts = [graph.constant(f"{name}.{p}", source.numpy(f"tower.{name}.{p}")) for p in ("weight", "bias")]
    return str(graph.node("LayerNormalization", x, *parts, axis=-1, epsilon=vision["layer_norm_eps"]))


def _layer(graph: Graph, source: Source, vision: dict[str, Any], number: int, x: str) -> str:
    """One encoder layer."""
    name = f"encoder.layers.{number}."
    h = _norm(graph, source, vision, x, f"{name}layer_norm1")
    parts = [_linear(graph, source, h, f"{name}self_attn.{part}_proj") for part in "qkv"]
    h = graph.node("MultiHeadAttention", *parts, domain=CONTRIB, num_heads=vision["num_attention_heads"])
    x = graph.node("Add", x, _linear(graph, source, h, f"{name}self_attn.out_proj"))
    h = _norm(graph, source, vision, x, f"{name}layer_norm2")
    h = _act(graph, _linear(graph, source, h, f"{name}mlp.fc1"), vision["hidden_act"])
    return str(graph.node("Add", x, _linear(graph, source, h, f"{name}mlp.fc2")))


def _linear(graph: Graph, source: Source, x: str, name: str) -> str:
    return graph.linear(x, name, *source.pair(f"tower.{name}"))


def _act(graph: Graph, x: str, name: str) -> str:
    if name == "quick_gelu":
        return str(graph.node("QuickGelu", x, domain=CONTRIB, alpha=1.702))
    return str(graph.node("Gelu", x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none"))
