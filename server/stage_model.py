"""The model of a stage: which parts are trained, LoRA, and writing the result, gathered where ZeRO split it.

Full weights are written as safetensors in the folder format of the start model, with its processor and `afya.json`; a
LoRA stage also writes the adapter by itself and merges it into the full-precision weights for the next stage.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from model import llava
from model.files import sync_folder
from server.stage_recipe import StageConfig

PARTS = {"tower": "vision_tower", "projector": "multi_modal_projector", "decoder": "language_model", "head": "lm_head"}
_TRAINED = {
    "projector": ("projector",),
    "llm+projector": ("projector", "decoder", "head"),
    "all": ("tower", "projector", "decoder", "head"),
    "lora": (),
}
_COPIED = ("afya.json", "import.json", "generation_config.json")


def open_model(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Model (on the CPU, weights in `dtype`) and processor of a local folder. Raises ModelError."""
    import torch

    llava.base_sha256(folder)  # says plainly when it is no model folder
    with llava.quiet_library():
        return llava.read(folder, 16 if dtype == "bfloat16" else 32, "cpu", getattr(torch, dtype))


def open_empty(folder: Path) -> tuple[Any, Any]:
    """The model without weights (sizes only) and the processor of a local folder. Raises ModelError."""
    llava.base_sha256(folder)
    with llava.quiet_library():
        return llava.empty(folder)


def image_side(processor: Any) -> int:
    """Side of the square picture in pixels that the processor makes."""
    size = processor.image_processor.crop_size or processor.image_processor.size
    return int(size.get("height") or size.get("shortest_edge"))


def choose_trainable(model: Any, stage: StageConfig) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The model with gradients only where the stage trains, and (trained, all) parameters of each part.

    A LoRA stage returns PEFT's wrapper with factors on every linear layer of the decoder.
    """
    wanted = _TRAINED[stage.trainable]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in wanted)
    if stage.trainable == "lora":
        from peft import LoraConfig, get_peft_model

        pattern = r".*language_model\.layers\.\d+\..*_proj"
        config = LoraConfig(
            r=stage.lora_rank, lora_alpha=stage.lora_alpha, lora_dropout=stage.lora_dropout, target_modules=pattern
        )
        model = get_peft_model(model, config)
    return model, counts(model)


def part_of(name: str) -> str:
    """The part ("tower", "projector", "decoder", "head" or "lora") a parameter belongs to."""
    if "lora_" in name:
        return "lora"
    return next(part for part, mark in PARTS.items() if mark in name)


def counts(model: Any) -> dict[str, tuple[int, int]]:
    """(trained, all) parameters of each part."""
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        trained, total = found.get(part_of(name), (0, 0))
        found[part_of(name)] = (trained + size * parameter.requires_grad, total + size)
    return found


def describe(found: dict[str, tuple[int, int]], trainable: str) -> str:
    """What is trained, in one line with counts."""
    parts = [f"{part} {trained:,} of {total:,}" for part, (trained, total) in found.items()]
    trained, total = (sum(pair[side] for pair in found.values()) for side in (0, 1))
    return f"Trains {trainable}: {trained:,} of {total:,} parameters ({', '.join(parts)})."


def gathered(engine: Any, names: Any, rank: int) -> dict[str, Any]:
    """Name to tensor on the CPU of the parameters for which `names(name)` holds; filled on rank 0, gathered on all."""
    import deepspeed

    state = {}
    for name, parameter in engine.module.model.named_parameters():
        if not names(name):
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank == 0:
                state[name] = parameter.detach().to("cpu", copy=True)
    return state


def write(model: Any, state: dict[str, Any], processor: Any, start: Path, out: Path, record: dict[str, Any]) -> Path:
    """Write `out/model` under a temporary name and put it in place whole; returns the folder."""
    final, partial = out / "model", out / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in _COPIED:
        if (start / name).is_file():
            shutil.copy(start / name, partial / name)
    model.save_pretrained(partial, state_dict=state, max_shard_size="2GB")
    processor.save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(out)
    return final


def merged(model: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The base model of PEFT's wrapper and its weights with the factors in `state` added (float32 sums)."""
    config = model.peft_config["default"]
    scale, plain = config.lora_alpha / config.r, {}
    for name, value in state.items():
        if "lora_" in name:
            continue
        short = name.removeprefix("base_model.model.").replace(".base_layer", "")
        a, b = (name.replace("base_layer.weight", f"lora_{factor}.default.weight") for factor in "AB")
        if a != name and a in state:
            value = (value.float() + scale * state[b].float() @ state[a].float()).to(value.dtype)
        plain[short] = value
    return model.unload(), plain


def save_adapter(state: dict[str, Any], alpha: float, start: Path, folder: Path) -> None:
    """The LoRA factors by themselves, as an adapter folder for the base model `start`."""
    from model import adapters

    arrays = {name.replace(".default.", "."): value.float().numpy() for name, value in state.items() if "lora_" in name}
    adapters.save(folder, arrays, adapters.spec_of(arrays, alpha, llava.base_sha256(start)))
