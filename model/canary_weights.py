"""Part of the canary: are the weights in memory those of the folder, and do the quantized kernels compute with them?

Tower and projector: everything that is not quantized must be equal to the file; of the quantized layers some are run
on random numbers and held against the product with the file's weights. Decoder layers only have to be of the right
type, since a folder that lacks one is refused when it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model import llava

_PARTS = ("vision_tower.", "multi_modal_projector.")
# Relative error of a product that still is the folder's: 4 bits lose about 0.1, 8 bits 0.01, 16 bits 0.005.
_WORST = {4: 0.25, 8: 0.05, 16: 0.03, 32: 0.001}
_SAMPLED = 4  # quantized layers that are run from each end: the tower's first, its last, and the projector's


def kernels(loaded: Any) -> str | None:
    """Every layer that should be quantized really holds 4- or 8-bit numbers; else a sentence about the first."""
    if loaded.bits >= 16:
        return None
    import torch

    kept = set(llava.unquantized(loaded.core.config))
    wanted = {4: torch.uint8, 8: torch.int8}[loaded.bits]
    for path, layer in loaded.core.named_modules():
        name = path.removesuffix(".base_layer")
        if not _is_linear(layer) or ".lora_" in path:
            continue
        found = layer.weight.dtype
        if (found == wanted) == (name in kept):
            instead = "quantized although it should not be" if name in kept else f"{str(found)[6:]} instead"
            return f"{loaded.bits} bits were asked for, but {name} is {instead}; install the pinned bitsandbytes again."
    return None


def bare(layer: Any) -> Any:
    """A linear layer without the adapter around it."""
    return getattr(layer, "base_layer", layer)


def tower(loaded: Any, folder: Path) -> str | None:
    """Tower and projector in memory against the folder's files; a sentence about the first difference."""
    import torch

    stored = _stored(folder)
    layers = {_tail(name): bare(m) for name, m in loaded.core.named_modules() if _tail(name) and _is_linear(bare(m))}
    packed = [name for name, layer in layers.items() if layer.weight.dtype in (torch.uint8, torch.int8)]
    quantized = {f"{name}.weight" for name in packed}
    for name, parameter in loaded.core.named_parameters():
        tail = _tail(name.replace(".base_layer", ""))
        if not tail or tail in quantized or ".lora_" in name:
            continue
        if tail not in stored:
            return f"{folder} holds no {tail}; copy the whole model folder again."
        if not torch.equal(stored[tail]().to(parameter.dtype), parameter.detach().cpu()):
            return f"{tail} in memory is not that of {folder}; start again, or copy the model folder again."
    for name in dict.fromkeys([*packed[:_SAMPLED], *packed[-_SAMPLED:]]):
        if (error := _error(layers[name], stored[f"{name}.weight"]())) > _WORST[loaded.bits]:
            return f"{name} computes something else than the weights of {folder} (error {error:.2f}); start again."
    return None


def _error(layer: Any, weight: Any) -> float:
    """Relative error of a layer's product with random numbers."""
    import torch

    seeded = torch.Generator().manual_seed(0)
    given = torch.randn(32, weight.shape[1], generator=seeded)
    with torch.no_grad():
        bias = 0.0 if layer.bias is None else layer.bias.float().cpu()
        ready = given.to(layer.weight.device, _type(layer))
        found = layer(ready).float().cpu() - bias
    right = given @ weight.float().T
    return float((found - right).norm() / right.norm().clamp(min=1e-12))


def _type(layer: Any) -> Any:
    """Floating type that a quantized layer computes in."""
    import torch

    return getattr(layer, "compute_dtype", None) or (torch.float32 if layer.bias is None else layer.bias.dtype)


def _is_linear(layer: Any) -> bool:
    import torch

    return isinstance(layer, torch.nn.Linear)


def _tail(name: str) -> str:
    """The name of a tensor or layer from its part on, as all editions of the format have it; "" outside the parts."""
    for part in _PARTS:
        if part in name:
            return part + name.split(part, 1)[1].removeprefix("vision_model.")
    return ""


def _stored(folder: Path) -> dict[str, Any]:
    """For each tensor of tower and projector, by its tail, a function that reads it."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - no mapping
                if tail := _tail(key):
                    found[tail] = _reader(path, key)
    return found


def _reader(path: Path, key: str) -> Any:
    from safetensors import safe_open

    def read() -> Any:
        with safe_open(path, "pt") as shard:
            return shard.get_tensor(key)

    return read
