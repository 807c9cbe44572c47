"""Put a LoRA adapter beside a loaded model, replace it while the model runs, or take it away; never merge it.

An adapter is checked against this very base before anything changes, and the base's quantized weights stay the same bit
for bit through any number of swaps. Not covered: where adapters lie and which is current (`model.installed`).
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from model import adapters, llava


def warm() -> None:
    """Import what the first adapter needs: a second or more that should not be part of somebody's answer."""
    llava.prepare_environment()
    importlib.import_module("peft")


def attach(loaded: llava.Loaded, adapter: Path, *, train: bool = False) -> llava.Loaded:
    """A bare model with `adapter` beside its weights. Raises AdapterRejected before anything is changed."""
    digest = check_adapter(loaded, adapter)
    llava.prepare_environment()
    from peft import LoraConfig, get_peft_model

    if hasattr(loaded.model, "peft_config"):
        raise llava.ModelError("An adapter is attached already; swap it instead.")
    config = LoraConfig.from_pretrained(adapter)
    config.inference_mode, config.base_model_name_or_path = not train, None
    try:
        wrapped = get_peft_model(loaded.model, config)
        _fill(wrapped, "default", adapter)
    except BaseException:
        _strip(loaded.model)
        raise
    wrapped.eval()
    return replace(loaded, model=wrapped, adapter_sha256=digest)


def swap(loaded: llava.Loaded, adapter: Path | None) -> llava.Loaded:
    """Replace the attached adapter by another, or by none; a refused or failed one leaves the former in place."""
    if not hasattr(loaded.model, "peft_config"):
        return loaded if adapter is None else attach(loaded, adapter)
    if adapter is None:
        return replace(loaded, model=loaded.model.unload().eval(), adapter_sha256=None)
    digest = check_adapter(loaded, adapter)
    from peft import LoraConfig

    wrapped, former = loaded.model, loaded.model.active_adapter
    fresh = "default" if former != "default" else "swapped"
    try:
        wrapped.add_adapter(fresh, LoraConfig.from_pretrained(adapter))
        _fill(wrapped, fresh, adapter)
        wrapped.set_adapter(fresh)
    except BaseException:
        wrapped.set_adapter(former)
        if fresh in wrapped.peft_config:
            wrapped.delete_adapter(fresh)
        raise
    wrapped.delete_adapter(former)
    wrapped.eval()
    return replace(loaded, adapter_sha256=digest)


def _strip(model: Any) -> None:
    """Take half-attached LoRA layers out again, so that the base answers as before."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            model.set_submodule(name, layer.get_base_layer())
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(leftover, None)


def _fill(wrapped: Any, name: str, adapter: Path) -> None:
    """Copy an adapter's factors into the LoRA layers called `name`.

    PEFT's own loading asks the network for its state_dict, which makes bitsandbytes unpack and round the packed 4-bit
    weights again: the base would drift with every swap.
    """
    import torch

    layers = dict(wrapped.get_base_model().named_modules())
    with torch.no_grad():
        for key, values in adapters.load(Path(adapter))[0].items():
            factors = getattr(layers[adapters.module(key)], f"lora_{adapters.factor(key)}")
            factors[name].weight.copy_(torch.from_numpy(values.copy()))


def check_adapter(loaded: llava.Loaded, adapter: Path) -> str:
    """SHA-256 of an adapter folder that is sound and fits this very base; raises AdapterRejected otherwise."""
    folder = Path(adapter)
    _, spec = adapters.load(folder)
    if spec.base_sha256 != loaded.base_sha256:
        raise adapters.AdapterRejected(
            f"The adapter in {folder} was trained on another base model ({spec.base_sha256[:12]}, this one is "
            f"{loaded.base_sha256[:12]}); get the adapter for this model or the model for this adapter."
        )
    layers = dict(loaded.core.named_modules())
    for name, shape in zip(spec.names, spec.shapes, strict=True):
        layer = layers.get(adapters.module(name))
        side = "in_features" if adapters.factor(name) == "A" else "out_features"
        if layer is None or getattr(layer, side, None) != shape[1 if side == "in_features" else 0]:
            raise adapters.AdapterRejected(f"The adapter in {folder} has no place in this model for {name}.")
    return adapters.sha256(folder)
