"""One token for each row of a batch on a CUDA device, as a handful of fused kernels in a CUDA graph.

`transformers` launches about a thousand small kernels for a token, and the processor that launches them is the limit.
Here a layer is eight launches (norm, queries-keys-values, rotation, attention in two, output, norm, gate and up, down),
recorded once and replayed. The weights are those that the network was loaded with; nothing is quantized again and
nothing lies in memory twice. Adapters stay beside the weights, as everywhere.

Covers decoders of the Llama kind (Llama, Mistral, Qwen2) at 16, 8 and 4 bits; `unsuitable` says why another one is
answered by PyTorch's own layers instead. At 8 bits the activations stay as they are (LLM.int8 rounds them, too).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KINDS = ("llama", "mistral", "qwen2")
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
SPLITS = 16  # parts that attention over the keys is split into


@dataclass
class Weights:
    """Linear layers with one input as one matrix (n, k): NF4, int8 or 16 bits, and an adapter's factors beside it."""

    n: int
    k: int
    bits: int
    data: Any
    scales: tuple[Any, ...]  # 4 bits: maxima, levels, outer, offsets, code; 8 bits: one scale a row; else none
    bias: Any = None
    down: Any = None  # (r, k) float32: the adapter's first factors, one below the other
    up: Any = None  # (n, r) float32: its second factors, scaled, each for its own rows and columns


@dataclass
class Layer:
    """One decoder layer: its two norms and its four products."""

    norms: tuple[Any, Any]
    eps: float
    products: list[Weights] = field(default_factory=list)


def unsuitable(core: Any) -> str | None:
    """Why this network cannot be decoded here, as part of a sentence; None where it can."""
    import torch

    config = core.config.text_config
    if core.device.type != "cuda":
        return "it is not on a CUDA device"
    if core.get_input_embeddings().weight.dtype not in (torch.float16, torch.bfloat16):
        return "it computes in 32 bits"
    return unsuitable_kind(config) or _no_compiler()


def unsuitable_kind(config: Any) -> str | None:
    """Why a decoder of this configuration has no kernels here; None where it has."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type not in KINDS:
        return f"its decoder is a {config.model_type}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if width not in (16, 32, 64, 128, 256) or config.num_attention_heads // config.num_key_value_heads > 16:
        return f"its heads are {width} wide"
    inputs = (config.hidden_size, config.intermediate_size, config.num_attention_heads * width)
    if any(size % 64 for size in inputs):  # the blocks of NF4 would run over from one row of weights into the next
        return f"its layers are {', '.join(map(str, inputs))} wide, not all multiples of 64"
    return None


def _no_compiler() -> str | None:
    try:
        from model import cuda_kernels  # noqa: F401 - only whether it can be imported
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return None


def pack(network: Any, config: Any) -> list[Layer]:
    """The decoder's layers as the kernels take them. Weights of a group are laid side by side, and the network's own
    layers become views of that, so that memory does not grow."""
    layers = []
    for block in network.layers:
        parts = {**dict(block.self_attn.named_children()), **dict(block.mlp.named_children())}
        layer = Layer((block.input_layernorm.weight, block.post_attention_layernorm.weight), config.rms_norm_eps)
        layer.products = [joined([parts[name] for name in names]) for names in _GROUPS]
        layers.append(layer)
    return layers


def joined(modules: list[Any]) -> Weights:
    """Linear layers with the same input as one. Their biases and the active adapter come along."""
    import torch

    bases = [getattr(module, "base_layer", module) for module in modules]
    n, k = sum(base.out_features for base in bases), bases[0].in_features
    bits = _bits(bases[0])
    data, scales = {4: _nf4, 8: _int8, 16: _plain}[bits](bases)
    found = Weights(n, k, bits, data, scales)
    if any(base.bias is not None for base in bases):
        zeros = [base.bias if base.bias is not None else data.new_zeros(base.out_features) for base in bases]
        found.bias = torch.cat([part.detach().to(torch.float32) for part in zeros])
    found.down, found.up = factors(modules)
    return found


def _bits(base: Any) -> int:
    kind = type(base).__name__
    return 4 if kind == "Linear4bit" else 8 if kind == "Linear8bitLt" else 16


def _side_by_side(tensors: list[Any], put_back: Any) -> Any:
    """The tensors one after the other in one piece of memory; each owner gets its part as a view."""
    import torch

    if len(tensors) == 1:
        return tensors[0]
    whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
    start = 0
    for number, tensor in enumerate(tensors):
        put_back(number, whole[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()
    return whole


def _nf4(bases: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    import torch

    states = [base.weight.quant_state for base in bases]

    def weight(number: int, view: Any) -> None:
        bases[number].weight.data = view

    def maxima(number: int, view: Any) -> None:
        states[number].absmax = view

    data = _side_by_side([base.weight.data for base in bases], weight)
    levels = _side_by_side([state.absmax for state in states], maxima)
    outer = torch.cat([state.state2.absmax.float() for state in states])
    offsets = torch.cat([state.offset.float().expand(len(state.state2.absmax)) for state in states])
    return data, (levels, states[0].state2.code.float(), outer, offsets, states[0].code.float())


def _int8(bases: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    def weight(number: int, view: Any) -> None:
        base = bases[number]
        base.weight.data = view
        for holder in (base.weight, base.state):
            if getattr(holder, "CB", None) is not None:
                holder.CB = view

    def scale(number: int, view: Any) -> None:
        for holder in (bases[number].weight, bases[number].state):
            if getattr(holder, "SCB", None) is not None:
                holder.SCB = view

    data = _side_by_side([base.weight.data for base in bases], weight)
    scales = [base.state.SCB if base.state.SCB is not None else base.weight.SCB for base in bases]
    return data, (_side_by_side(scales, scale),)


def _plain(bases: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    def weight(number: int, view: Any) -> None:
        bases[number].weight.data = view

    return _side_by_side([base.weight.data for base in bases], weight), ()


def factors(modules: list[Any]) -> tuple[Any, Any]:
    """First factors (r, k) of the active adapter one below the other, second ones (n, r) on a diagonal of blocks."""
    import torch

    found = [_active(module) for module in modules]
    if not any(found):
        return None, None
    downs, blocks = [], []
    for module, name in zip(modules, found, strict=True):
        if name is None:
            blocks.append(torch.zeros(module.out_features, 0, device=module.weight.device))
            continue
        downs.append(module.lora_A[name].weight.detach().float())
        blocks.append(module.lora_B[name].weight.detach().float() * module.scaling[name])
    wide = sum(block.shape[1] for block in blocks)
    up = torch.zeros(sum(block.shape[0] for block in blocks), wide, device=downs[0].device)
    row = column = 0
    for block in blocks:
        up[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return torch.cat(downs).contiguous(), up


def _active(module: Any) -> str | None:
    """Name of the adapter that acts in a layer."""
    if not hasattr(module, "lora_A") or module.disable_adapters:
        return None
    return next((name for name in module.active_adapters if name in module.lora_A), None)
