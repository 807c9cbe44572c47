"""Load a LLaVA model at 32, 16, 8 or 4 bits on a CPU or a CUDA device, with a LoRA adapter beside it (never merged).

Which parts are quantized: every linear layer of decoder, projector and vision tower whose weights fill blocks of 64.
Embeddings, norms, the patch convolution and `lm_head` keep the compute type. The choice depends on the model alone,
never on the machine: all clinics of a federation must hold the same base. 4 bits is NF4 with double quantization,
8 bits LLM.int8.

Nothing is fetched: only local folders are read. Putting adapters beside the model: `model.attach`. Does not cover
converting published checkpoints or ONNX.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import files, prompts
from model.prompts import Template

BITS = (32, 16, 8, 4)
_HASHED = (".safetensors", ".json", ".jinja", ".model", ".txt")
# Evidence, not the model:
_UNHASHED = ("import.json", "release.json", "report.json", "training.json", "trainer_state.json")
KEPT = ("lm_head",)  # full names of layers, or of parts with a trailing dot, that are never quantized
_PACKED = "support_avx512bf16_for_cpu"  # bitsandbytes' switch of that kernel
_BLOCK = 64  # weights that share a scale
_IN_MULTIPLE, _OUT_MULTIPLE = 64, 32  # what the packed 4-bit CPU kernel of bitsandbytes takes


class ModelError(RuntimeError):
    """A model or adapter cannot be loaded; the message says which, why and what to do."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to use. `model` is the LLaVA model, or PEFT's wrapper around it when an adapter is attached."""

    model: Any
    processor: Any
    bits: int
    device: str
    dtype: str
    reason: str
    base_sha256: str
    adapter_sha256: str | None
    path: Path
    template: Template

    @property
    def core(self) -> Any:
        """The LlavaForConditionalGeneration itself; an attached adapter acts inside its layers."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model


def prepare_environment() -> None:
    """Forbid network access and silence notices of the libraries; call before the first import of transformers."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ[name] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait should sleep: spinning ones cost a factor of 3 to 5 as soon as another process wants the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed where it is installed
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)


def base_sha256(folder: Path) -> str:
    """SHA-256 over the names and contents of the weights, configuration and tokenizer files of a model folder.

    Renaming the folder or adding a readme changes nothing; any other byte of weight, vocabulary or template does.
    """
    names = sorted(p.name for p in Path(folder).glob("*") if p.suffix in _HASHED and p.name not in _UNHASHED)
    if "config.json" not in names:
        raise ModelError(f"{folder} holds no config.json, so it is no model folder; name one that is.")
    listing = [[name, files.sha256_file(Path(folder) / name)] for name in names]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def load(
    model: Path, bits: int, *, adapter: Path | None = None, device: str | None = None, train: bool = False
) -> Loaded:
    """Load the model folder at `bits`, attach `adapter` if given, and say on what and why.

    `device` is "cpu", "cuda" or "cuda:N"; by default CUDA where there is one. With `train` the adapter's weights are
    trainable and the packed 4-bit CPU kernel is off, because it loses gradients after the first generated answer.
    Raises ModelError with one plain sentence.
    """
    if bits not in BITS:
        raise ModelError(f"{bits} bits are not offered; choose 32, 16, 8 or 4.")
    model = Path(model)
    digest = base_sha256(model)
    template = _template(model)
    prepare_environment()
    import torch

    place, dtype, reason = choose(bits, device)
    with quiet_library():
        network, processor = read(model, bits, place, getattr(torch, dtype))
    if bits < 16:
        contiguous_inputs(network)
    if train:
        keep_gradients(network)
        network.requires_grad_(False)
    network.eval()
    loaded = Loaded(network, processor, bits, place, dtype, reason, digest, None, model, template)
    if adapter is None:
        return loaded
    from model.attach import attach

    return attach(loaded, adapter, train=train)


def _template(folder: Path) -> Template:
    try:
        return prompts.template_of(folder)
    except prompts.TemplateUnknown as error:
        raise ModelError(str(error)) from error


def choose(bits: int, device: str | None = None) -> tuple[str, str, str]:
    """Device, compute type and the reason for both in one sentence. Raises ModelError for a CUDA device not there."""
    import torch

    there = torch.cuda.is_available()
    place = device or ("cuda" if there else "cpu")
    weights = {32: "fp32", 16: "16-bit", 8: "LLM.int8", 4: "NF4"}[bits] + " weights"
    if place.startswith("cuda"):
        if not there:
            raise ModelError("No CUDA device was found; leave out --device or choose cpu.")
        dtype = _cuda_type(bits)
        return place, dtype, f"{torch.cuda.get_device_name(place)}: {weights}, {dtype} compute."
    why = "CPU was asked for" if device else "no CUDA device: CPU"
    threads = f"{torch.get_num_threads()} threads"
    fast = bool(torch.cpu._is_avx512_bf16_supported())
    if bits == 32:
        return place, "float32", f"{why}, {threads}; {weights}, float32 compute."
    if bits == 16:
        speed = "AVX512_BF16 is here" if fast else "no AVX512_BF16, so slower than 32 bits but half the memory"
        return place, "bfloat16", f"{why}, {threads}; {speed}; bfloat16 weights and compute."
    if bits == 8:
        return place, "float32", f"{why}, {threads}; {weights}, int8 products, float32 for the rest."
    if fast:
        return place, "float32", f"{why}, {threads}; AVX512_BF16 is here: {weights}, bfloat16 products, float32 rest."
    return place, "float32", f"{why}, {threads}; no AVX512_BF16: {weights} unpacked to float32 for each product."


def _cuda_type(bits: int) -> str:
    import torch

    if bits == 32:
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


@contextmanager
def quiet_library() -> Iterator[None]:
    """Loading without transformers' progress bars and reports: what matters is raised as an error here."""
    from transformers.utils import logging as notices

    level = notices.get_verbosity()
    notices.set_verbosity_error()
    notices.disable_progress_bar()
    try:
        yield
    finally:
        notices.set_verbosity(level)
        notices.enable_progress_bar()


def read(folder: Path, bits: int, device: str, dtype: Any) -> tuple[Any, Any]:
    """Network and processor from disk; every weight must be there. Raises ModelError."""
    from safetensors import SafetensorError
    from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    try:
        config = LlavaConfig.from_pretrained(folder, local_files_only=True)
        if bits < 16:
            options |= {"quantization_config": quantization(config, bits, dtype), "device_map": {"": device}}
        network, found = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **options)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded at {bits} bits: {_first_line(error)}") from error
    lost = sorted(found["missing_keys"]) + sorted(found["mismatched_keys"])
    if lost:
        raise ModelError(f"{folder} lacks {len(lost)} weights, first {lost[0]}; copy the whole model folder again.")
    processor.tokenizer.padding_side = "left"
    return (network if bits < 16 else network.to(device)), processor


def empty(folder: Path) -> tuple[Any, Any]:
    """The network without weights (on the meta device) and the processor of a folder. Raises ModelError."""
    from transformers import AutoProcessor, LlavaConfig

    try:
        config = LlavaConfig.from_pretrained(folder, local_files_only=True)
        return _shapes(config), AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} cannot be read as a model: {_first_line(error)}") from error


def _shapes(config: Any) -> Any:
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):  # of this thread alone; accelerate's empty weights patch torch for all threads
        return LlavaForConditionalGeneration(config)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def quantization(config: Any, bits: int, dtype: Any) -> Any:
    """BitsAndBytesConfig for 8 or 4 bits; layers that must stay are named in full, short names are silently ignored."""
    from transformers import BitsAndBytesConfig

    skip = unquantized(config)
    if bits == 8:  # outlier columns (threshold > 0) are those of the whole batch: rows would change each other
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def unquantized(config: Any) -> list[str]:
    """Full names of the linear layers that keep their precision: those of `KEPT` and those whose shape does not fit."""
    import torch

    linears = [(name, layer) for name, layer in _shapes(config).named_modules() if isinstance(layer, torch.nn.Linear)]
    return [
        name
        for name, layer in linears
        if name in KEPT
        or name.startswith(tuple(part for part in KEPT if part.endswith(".")))
        or (layer.in_features * layer.out_features) % _BLOCK
    ]


def contiguous_inputs(network: Any) -> None:
    """Guard the packed 4-bit CPU kernel: contiguous inputs, for it reads anything else as other numbers, and only
    layers whose shape it takes; the others are unpacked for each product.

    A vision tower's transposed patch positions reach the projector so; with one picture the features came out wrong
    (relative error 1.4 instead of 0.003, bitsandbytes 0.50.2) and nothing said so.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for layer in network.modules():
        if isinstance(layer, (Linear4bit, Linear8bitLt)):
            layer.register_forward_pre_hook(_contiguous)
        if hasattr(layer, _PACKED) and (layer.in_features % _IN_MULTIPLE or layer.out_features % _OUT_MULTIPLE):
            setattr(layer, _PACKED, False)


def _contiguous(_layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


def keep_gradients(network: Any) -> None:
    """Switch off the packed 4-bit CPU kernel: after an answer in eval mode it would silently give no gradients."""
    for layer in network.modules():
        if hasattr(layer, _PACKED):
            setattr(layer, _PACKED, False)
