"""LoRA adapters as files and as arrays: what the clinics exchange and the kiosk loads, and the checks on both.

An adapter folder is a PEFT folder (adapter_config.json, adapter_model.safetensors) with optional release.json. A state
is the same as arrays, under PEFT's own names. NumPy only, except `initial`, which asks transformers for layer shapes.
Not here: attaching an adapter to a model (`model.llava`), and where an installed one lies (`model.installed`).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.files import plain_pieces, write_atomic
from model.installed import current, install, rollback

__all__ = ["AdapterRejected", "AdapterSpec", "current", "install", "rollback"]

State = dict[str, np.ndarray]

CONFIG, WEIGHTS, RELEASE = "adapter_config.json", "adapter_model.safetensors", "release.json"
DECODER = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
PROJECTOR = r"model\.multi_modal_projector\.linear_[12]"
TOWER = r"model\.vision_tower\.(vision_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
TARGETS = {"decoder": DECODER, "projector": PROJECTOR, "tower": TOWER}
FILES = {CONFIG: 1 << 20, WEIGHTS: 1 << 30}  # most bytes of each: 200 million values (model.wire) take 800 MB
MAX_HEADER = 4 << 20  # bytes of a safetensors header: thousands of layers fit, a claimed gigabyte does not

_NAME = re.compile(r"base_model\.model\.([A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)\.lora_([AB])\.weight")
_SHA = re.compile(r"[0-9a-f]{64}")


class AdapterRejected(ValueError):
    """An adapter cannot be used; the message says what is wrong with it and what to do."""


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter must look like: `names` sorted, `shapes` and `dtypes` in the same order, and for which base."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    base_sha256: str


def factor(name: str) -> str:
    """Which factor an array is: "A" (rank, in) or "B" (out, rank). Raises AdapterRejected for any other name."""
    found = _NAME.fullmatch(name)
    if not found:
        raise AdapterRejected(f"{name[:120]!r} is not the name of a LoRA factor.")
    return found[2]


def module(name: str) -> str:
    """Full name, inside the base model, of the layer that an array belongs to. Raises AdapterRejected."""
    found = _NAME.fullmatch(name)
    if not found:
        raise AdapterRejected(f"{name[:120]!r} is not the name of a LoRA factor.")
    return found[1]


def targets_pattern(targets: str) -> str:
    """Regular expression of `targets`: names of `TARGETS` joined by "+" ("decoder+tower"), or an expression itself."""
    parts = targets.split("+")
    if all(part in TARGETS for part in parts):
        return "|".join(f"(?:{TARGETS[part]})" for part in parts)
    return targets


def spec_of(state: Mapping[str, np.ndarray], alpha: float, base_sha256: str) -> AdapterSpec:
    """The spec of arrays that are already trusted. Raises AdapterRejected when they are no complete set of pairs."""
    names = tuple(sorted(state))
    ranks = {state[name].shape[0 if factor(name) == "A" else -1] for name in names if state[name].ndim == 2}
    modules = tuple(sorted({module(name) for name in names}))
    pairs = {f"base_model.model.{m}.lora_{f}.weight" for m in modules for f in "AB"}
    if not names or len(ranks) != 1 or pairs != set(names) or any(a.ndim != 2 for a in state.values()):
        raise AdapterRejected("The arrays are not complete pairs of A and B factors of one rank.")
    shapes = tuple(tuple(int(n) for n in state[name].shape) for name in names)
    dtypes = tuple(str(state[name].dtype) for name in names)
    return AdapterSpec(names, shapes, dtypes, int(ranks.pop()), float(alpha), modules, base_sha256)


def check(state: Mapping[str, np.ndarray], spec: AdapterSpec) -> None:
    """Raise AdapterRejected unless the arrays have exactly the names, shapes and dtypes of `spec` and are finite."""
    if extra := sorted(set(state) - set(spec.names)):
        raise AdapterRejected(f"The adapter has {len(extra)} unexpected arrays, the first is {extra[0][:120]!r}.")
    if lacking := sorted(set(spec.names) - set(state)):
        raise AdapterRejected(f"The adapter lacks {len(lacking)} arrays, the first is {lacking[0]}.")
    for name, shape, dtype in zip(spec.names, spec.shapes, spec.dtypes, strict=True):
        array = state[name]
        if tuple(array.shape) != shape:
            raise AdapterRejected(f"{name} has shape {tuple(array.shape)}, expected {shape}.")
        if str(array.dtype) != dtype:
            raise AdapterRejected(f"{name} has dtype {array.dtype}, expected {dtype}.")
        if not np.isfinite(array).all():
            raise AdapterRejected(f"{name} holds values that are not finite.")


def initial(base: Path, rank: int, alpha: float, targets: str, seed: int) -> State:
    """Start factors for the model in `base`: A uniform in ±1/sqrt(in) from `seed`, B zero (no effect yet), float32.

    `alpha` takes no part in the values; it is here so that a caller names the whole adapter in one place.
    Raises AdapterRejected when no linear layer matches `targets` (see `targets_pattern`).
    """
    if rank < 1 or alpha <= 0:
        raise AdapterRejected(f"An adapter needs a rank of at least 1 and a positive alpha, not {rank} and {alpha}.")
    try:
        pattern = re.compile(targets_pattern(targets))
    except re.error as error:
        raise AdapterRejected(f"The targets {targets!r} are no expression ({error}); try decoder.") from error
    shapes = {name: shape for name, shape in linear_shapes(base).items() if pattern.fullmatch(name)}
    if not shapes:
        raise AdapterRejected(f"No linear layer of {base} matches the targets {targets!r}; try decoder.")
    generator = np.random.default_rng(seed)
    state: State = {}
    for name in sorted(shapes):
        out_features, in_features = shapes[name]
        bound = 1 / np.sqrt(in_features)
        draw = generator.uniform(-bound, bound, (rank, in_features))
        state[f"base_model.model.{name}.lora_A.weight"] = draw.astype(np.float32)
        state[f"base_model.model.{name}.lora_B.weight"] = np.zeros((out_features, rank), np.float32)
    return state


def linear_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of the model in `base`, by name; builds it without weights (no memory)."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base))
    linears = ((name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    return {name: (linear.out_features, linear.in_features) for name, linear in linears}


def _config(spec: AdapterSpec) -> dict[str, Any]:
    alpha = int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha
    return {
        "base_model_name_or_path": f"sha256:{spec.base_sha256}",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": spec.rank,
        "target_modules": list(spec.target_modules),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def save(folder: Path, state: Mapping[str, np.ndarray], spec: AdapterSpec) -> None:
    """Write a PEFT adapter folder, the same bytes for the same arrays. Raises AdapterRejected before it writes."""
    from safetensors.numpy import save as to_bytes

    check(state, spec)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(state[name]) for name in spec.names}
    write_atomic(folder / CONFIG, (json.dumps(_config(spec), indent=1, sort_keys=True) + "\n").encode())
    write_atomic(folder / WEIGHTS, to_bytes(arrays, metadata={"format": "pt"}))


def spec(folder: Path) -> AdapterSpec:
    """Read the spec of an adapter folder from its configuration and the weights' header. Raises AdapterRejected."""
    return load(folder)[1]


def pieces(folder: Path, name: str) -> Iterator[bytes]:
    """The bytes of one of an adapter folder's `FILES`, piece by piece, as a stranger's: see `files.plain_pieces`.

    Raises AdapterRejected.
    """
    try:
        yield from plain_pieces(folder / name, FILES[name])
    except PermissionError as error:
        raise AdapterRejected(
            f"{folder} may not be read by this user; log out and in again, then start the kiosk anew, since "
            "`afya-client join --service` put this user into a group."
        ) from error
    except OSError as error:
        raise AdapterRejected(f"{folder} is not a readable adapter folder ({error}).") from error


def load(folder: Path) -> tuple[State, AdapterSpec]:
    """Read and check an adapter folder: arrays and spec. Raises AdapterRejected with one plain sentence."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    text, data = b"".join(pieces(folder, CONFIG)), b"".join(pieces(folder, WEIGHTS))
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"{folder / CONFIG} is damaged ({error}).") from error
    if len(data) < 8 or int.from_bytes(data[:8], "little") > min(MAX_HEADER, len(data)):
        raise AdapterRejected(f"{folder / WEIGHTS} is truncated or not a safetensors file.")
    try:
        state = dict(from_bytes(data))
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterRejected(f"{folder / WEIGHTS} is damaged ({error}).") from error
    found = _spec_from(config, state, folder)
    check(state, found)
    return state, found


def _spec_from(config: object, state: State, folder: Path) -> AdapterSpec:
    """Spec of loaded arrays, held against what the configuration file promises."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterRejected(f"{folder / CONFIG} does not describe a LoRA adapter.")
    base = str(config.get("base_model_name_or_path") or "").removeprefix("sha256:")
    alpha, rank, targets = config.get("lora_alpha"), config.get("r"), config.get("target_modules")
    if not _SHA.fullmatch(base):
        raise AdapterRejected(f"{folder / CONFIG} does not name its base model by sha256.")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise AdapterRejected(f"{folder / CONFIG} has no usable lora_alpha.")
    found = spec_of(state, float(alpha), base)
    if found.rank != rank or list(found.target_modules) != targets:
        raise AdapterRejected(f"{folder}: rank or target layers of the configuration are not those of the weights.")
    return found


def state_bytes(state: Mapping[str, np.ndarray]) -> int:
    """Size of the arrays in bytes."""
    return sum(array.nbytes for array in state.values())


def sha256(folder: Path) -> str:
    """One hash of an adapter folder, configuration and weights; the same arrays give the same hash everywhere.

    Raises AdapterRejected.
    """
    digest = hashlib.sha256()
    for name in FILES:
        part = hashlib.sha256()
        for piece in pieces(folder, name):
            part.update(piece)
        digest.update(part.digest())
    return digest.hexdigest()
