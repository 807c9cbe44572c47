"""A model folder with bitsandbytes weights as files: NF4 or LLM.int8, quantized once instead of at every start.

The layers, types and quantized values are those that `model.llava.load` makes of the plain folder on a CPU, bit for
bit, so an adapter trained on one answers on the other; the manifest names the plain folder's hash as the base.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from model import attach, files, llava, manifest, prompts
from model.llava import ModelError
from model.quantize import already, copy_texts, versions


def write(model: Path, out: Path, bits: int) -> dict[str, Any]:
    """Write the folder `out` and return its manifest. Raises ModelError, or OSError where the disk refuses.

    The whole model is in memory in float32 while it is quantized. An unfinished run starts again.
    """
    model, out = Path(model), Path(out)
    if bits not in (8, 4):
        raise ModelError(f"{bits} bits are not offered; choose 8 or 4.")
    identity = {"backend": "torch", "base_sha256": llava.base_sha256(model), "bits": bits, "format": manifest.FORMAT}
    if out.exists():
        return already(out, identity)
    llava.prepare_environment()
    import torch

    with llava.quiet_library():
        network, _ = llava.read(model, bits, "cpu", torch.float32)
        partial = out.parent / f".{out.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        network.save_pretrained(partial, state_dict=_narrow(network, model), max_shard_size="2GB")
    copy_texts(model, partial, ("config.json",))
    facts = {"calibration": None, "model": model.resolve().name, "parameters": _parameters(model)}
    listed = manifest.describe(partial, [path.name for path in partial.iterdir()])
    manifest.write(partial, {**identity, **facts, "files": listed, "versions": versions()})
    _flush(partial)
    os.replace(partial, out)
    files.sync_folder(out.parent)
    return manifest.read(out)


def load(folder: Path, adapter: Path | None = None, device: str | None = None) -> llava.Loaded:
    """A folder written by `write`, checked against its manifest, as `llava.load` returns it. Raises ModelError."""
    facts = manifest.verify(folder)
    bits = int(facts["bits"])
    llava.prepare_environment()
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    place, dtype, reason = llava.choose(bits, device)
    kind = getattr(torch, dtype)
    try:
        with llava.quiet_library():
            network = LlavaForConditionalGeneration.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=kind, device_map={"": place}
            )
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    for layer in network.modules():
        if hasattr(layer, "compute_dtype"):  # the type that the weights were written with
            layer.compute_dtype = kind
    processor.tokenizer.padding_side = "left"
    llava.contiguous_inputs(network)
    network.eval()
    base, template = str(facts["base_sha256"]), prompts.template_of(folder)
    reason = f"{reason[:-1]}, quantized before."
    loaded = llava.Loaded(network, processor, bits, place, dtype, reason, base, None, Path(folder), template)
    return loaded if adapter is None else attach.attach(loaded, adapter)


def _narrow(network: Any, model: Path) -> dict[str, Any]:
    """The state, weights that are not quantized in the narrow type they came in where that loses nothing."""
    import torch

    from model.onnx_source import config

    narrow = getattr(torch, str(config(model).get("dtype") or "float32").removeprefix("torch."))
    state: dict[str, Any] = network.state_dict()
    for name, tensor in state.items():
        if tensor.dtype == torch.float32 and name.endswith((".weight", ".bias")):
            smaller = tensor.to(narrow)
            if torch.equal(smaller.to(torch.float32), tensor):
                state[name] = smaller
    return state


def _parameters(model: Path) -> int:
    from model.onnx_source import Source

    return Source(model).parameters()


def _flush(folder: Path) -> None:
    """Everything in a folder onto the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    files.sync_folder(folder)
