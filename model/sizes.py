"""How many parameters a LLaVA model has and how many bytes they take at 32, 16, 8 and 4 bits, by arithmetic alone.

Counts what `model.llava` loads: every linear layer of decoder, projector and tower whose weights fill blocks of 64 is
quantized; embeddings, norms, the patch convolution, `lm_head` and the other linears keep 16 (or 32) bits. Works on
the content of a config.json, so that no weights and no torch are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_BLOCK, _SECOND_BLOCK = 64, 256  # weights with one scale, scales with one scale of their own (NF4, double)
_TABLES = 16 * 4 + 256 * 4 + 4  # code books of both steps and the mean of the scales, per layer


@dataclass(frozen=True)
class Linear:
    """`count` linear layers of one shape; `fixed` for `lm_head`, which is never quantized."""

    inputs: int
    outputs: int
    count: int
    bias: bool = False
    fixed: bool = False

    @property
    def quantized(self) -> bool:
        """Whether 8 and 4 bits apply to it."""
        return not (self.fixed or self.inputs * self.outputs % _BLOCK)


def _decoder(text: dict[str, Any]) -> Iterator[Linear]:
    hidden, heads, layers = text["hidden_size"], text["num_attention_heads"], text["num_hidden_layers"]
    width = text.get("head_dim") or hidden // heads
    few = (text.get("num_key_value_heads") or heads) * width
    yield Linear(hidden, heads * width, layers)
    yield Linear(hidden, few, 2 * layers)
    yield Linear(heads * width, hidden, layers)
    yield Linear(hidden, text["intermediate_size"], 2 * layers)
    yield Linear(text["intermediate_size"], hidden, layers)


def _tower(vision: dict[str, Any]) -> Iterator[Linear]:
    hidden, layers, inner = vision["hidden_size"], vision["num_hidden_layers"], vision["intermediate_size"]
    yield Linear(hidden, hidden, 4 * layers, bias=True)
    yield Linear(hidden, inner, layers, bias=True)
    yield Linear(inner, hidden, layers, bias=True)


def linears(config: dict[str, Any]) -> list[Linear]:
    """All linear layers of a Llava config.json's content."""
    text, vision = config["text_config"], config["vision_config"]
    found = [*_decoder(text), *_tower(vision)]
    found += [Linear(vision["hidden_size"], text["hidden_size"], 1, bias=True)]
    found += [Linear(text["hidden_size"], text["hidden_size"], 1, bias=True)]
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return found if tied else [*found, Linear(text["hidden_size"], text["vocab_size"], 1, fixed=True)]


def _others(config: dict[str, Any]) -> int:
    """Parameters that are not in a linear layer: embeddings, norms, the patch convolution."""
    text, vision = config["text_config"], config["vision_config"]
    hidden, wide = text["hidden_size"], vision["hidden_size"]
    clip = vision.get("model_type", "").startswith("clip")
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    count = text["vocab_size"] * hidden + (2 * text["num_hidden_layers"] + 1) * hidden
    count += vision.get("num_channels", 3) * vision["patch_size"] ** 2 * wide + (0 if clip else wide)
    count += (patches + (1 if clip else 0)) * wide + (wide if clip else 0)  # positions, class token
    norms = 2 * vision["num_hidden_layers"] + (2 if clip else 1)
    return int(count + norms * 2 * wide)


def parameters(config: dict[str, Any]) -> int:
    """Number of parameters of a Llava config.json's content; a tied head counts once."""
    inside = sum(part.count * part.outputs * (part.inputs + part.bias) for part in linears(config))
    return inside + _others(config)


def static_bytes(config: dict[str, Any], bits: int, rest_bytes: int = 2) -> int:
    """Bytes of all weights with their scales at `bits`; what is not quantized takes `rest_bytes` each.

    On a CPU what is not quantized is float32 at 8 and 4 bits: `rest_bytes` 4.
    """
    if bits >= 16:
        return parameters(config) * bits // 8
    total = _others(config) * rest_bytes
    for part in linears(config):
        weights, biases = part.inputs * part.outputs, part.outputs * part.bias
        if not part.quantized:
            total += part.count * (weights + biases) * rest_bytes
        elif bits == 8:
            total += part.count * (weights + 4 * part.outputs + biases * rest_bytes)
        else:
            scales = -(-weights // _BLOCK)
            each = weights // 2 + scales + 4 * -(-scales // _SECOND_BLOCK) + _TABLES
            total += part.count * (each + biases * rest_bytes)
    return total
