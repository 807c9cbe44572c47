"""What an imported model is made of: which tensor of which file becomes which weight, before anything is written.

Main weights, files with a part of them (`mm_projector.bin`, `non_lora_trainables.bin`, `vision_tower/`), LoRA factors
that are merged, and the vision tower's own folder. Every key must have a place or be known to be of no use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model import checkpoint_keys as keys
from model.checkpoint_source import CheckpointError, Entry, Reader, entries_of, extra_files, read_json, weight_files

_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass
class Weights:
    """Found weights by canonical name, LoRA factors by the name they adapt, keys left out, and what is worth saying."""

    named: dict[str, Entry] = field(default_factory=dict)
    lora: dict[str, dict[str, Entry]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, found: dict[str, Entry], *, replace: bool, what: str) -> None:
        """Add weights; those already there are replaced, or kept with a note."""
        old = [name for name in found if name in self.named]
        if old and not replace:
            self.notes.append(f"{what}: {len(old)} weights left out, because the checkpoint's main files hold them")
        self.named |= found if replace else {n: e for n, e in found.items() if n not in self.named}


def needs_base(src: Path) -> bool:
    """Whether a folder holds only a part of a model: LoRA factors or a projector."""
    return (src / "adapter_config.json").is_file() or not weight_files(src)


def collect(src: Path, base: Path | None, reader: Reader) -> Weights:
    """All weights of `src`, on top of those of `base` if `src` is a part of a model. Raises CheckpointError."""
    found = Weights()
    partial = needs_base(src)
    adapter = next((src / name for name in _ADAPTER if (src / name).is_file()), None)
    if partial and not extra_files(src) and adapter is None:
        raise CheckpointError(f"{src} holds no weights; give the folder with the .safetensors or .bin files.")
    if (src / "adapter_config.json").is_file() and adapter is None:
        raise CheckpointError(f"{src} lacks adapter_model.safetensors and adapter_model.bin; copy one of them there.")
    if partial and base is None:
        raise CheckpointError(f"{src} holds only a part of a model; give the model it was trained on with --base.")
    if partial and base is not None:
        if needs_base(base):
            raise CheckpointError(f"{base} is no whole model, so nothing can be put on it; import that one first.")
        _whole(found, base, reader)
    else:
        _whole(found, src, reader)
    if partial:
        for path in extra_files(src):
            found.take(_named([path], reader, found), replace=True, what=path.name)
        _tower_folder(found, src, reader, replace=True)
    if adapter is not None and partial:
        _adapter(found, src, adapter, reader)
    return found


def _whole(found: Weights, folder: Path, reader: Reader) -> None:
    found.take(_named(weight_files(folder), reader, found), replace=True, what="main")
    for path in extra_files(folder):
        found.take(_named([path], reader, found), replace=False, what=path.name)
    _tower_folder(found, folder, reader, replace=False)


def _tower_folder(found: Weights, folder: Path, reader: Reader, *, replace: bool) -> None:
    if paths := weight_files(folder / "vision_tower"):
        named, dropped = tower_weights(paths, reader)
        found.dropped += dropped
        found.take(named, replace=replace, what="vision_tower")


def _named(paths: Iterable[Path], reader: Reader, found: Weights) -> dict[str, Entry]:
    named, dropped = _sorted_out(entries_of(list(paths), reader), keys.canonical, keys.is_dropped)
    found.dropped += dropped
    return named


def tower_weights(paths: list[Path], reader: Reader) -> tuple[dict[str, Entry], list[str]]:
    """(weights by canonical name, keys left out) of a tower's own files. Raises CheckpointError for an unknown key."""
    return _sorted_out(entries_of(paths, reader), keys.canonical_tower, keys.is_dropped_tower)


def _sorted_out(
    entries: list[Entry], name_of: Callable[[str], str | None], useless: Callable[[str], bool]
) -> tuple[dict[str, Entry], list[str]]:
    named: dict[str, Entry] = {}
    dropped, unknown = [], []
    for entry in entries:
        name = name_of(entry.key)
        if useless(entry.key):
            dropped.append(entry.key)
        elif name is None:
            unknown.append(entry)
        elif name in named:
            raise CheckpointError(f"{entry.path} holds {name} twice, as {named[name].key} and as {entry.key}.")
        else:
            named[name] = entry
    if unknown:
        first = unknown[0]
        raise CheckpointError(f"{first.path} holds {len(unknown)} weights that have no place, first {first.key}.")
    return named, dropped


def _adapter(found: Weights, src: Path, path: Path, reader: Reader) -> None:
    """LoRA factors and whole weights of a PEFT folder; each factor needs its partner and a weight to act on."""
    settings = read_json(src / "adapter_config.json")
    if settings.get("use_dora") or settings.get("fan_in_fan_out") or settings.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{src} is no plain LoRA adapter (DoRA or another method); merge it with its own code.")
    rest = []
    for entry in reader.entries(path):
        if part := keys.lora_part(entry.key):
            found.lora.setdefault(part[0], {})[part[1]] = entry
        else:
            rest.append(entry)
    named, dropped = _sorted_out(rest, keys.canonical, keys.is_dropped)
    found.dropped += dropped
    found.take(named, replace=True, what=path.name)
    for name, pair in found.lora.items():
        if set(pair) != {"A", "B"} or name not in found.named:
            raise CheckpointError(f"{path} adapts {name}, but a factor or the weight itself is missing.")
        rank = pair["A"].shape[0]
        if (pair["B"].shape[0], pair["A"].shape[1]) != found.named[name].shape or pair["B"].shape[1] != rank:
            raise CheckpointError(f"{path} does not fit {name} of the base model; give the base it was trained on.")
        found.scales[name] = _alpha(settings, name) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _alpha(settings: dict[str, Any], name: str) -> float:
    """lora_alpha of one weight: PEFT's `alpha_pattern` has regular expressions for the end of a layer's name."""
    layer = name.removesuffix(".weight").replace("model.language_model.", "model.")
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(alpha)
    return float(settings.get("lora_alpha", 8))


def complete(found: Weights, expected: dict[str, tuple[int, ...]], tower_layers: int) -> None:
    """Check that `found` holds each expected weight in its shape and nothing else; layers of no use are left out.

    Embedding and head may have one row less than expected: the row of `<image>`. Raises CheckpointError naming the
    first misfit.
    """
    for name in [n for n in found.named if keys.is_beyond_tower(n, tower_layers)]:
        found.dropped.append(found.named.pop(name).key)
    if keys.HEAD in found.named and keys.HEAD not in expected:
        found.dropped.append(found.named.pop(keys.HEAD).key)
    lost = [name for name in expected if name not in found.named]
    if lost:
        raise CheckpointError(f"The checkpoint lacks {len(lost)} weights, first {lost[0]}; copy all of its files.")
    odd = [name for name in found.named if name not in expected]
    if odd:
        entry = found.named[odd[0]]
        raise CheckpointError(f"{entry.path} holds {len(odd)} weights that config.json has no place for: {entry.key}.")
    for name, shape in expected.items():
        have = found.named[name].shape
        if have != shape and not (name in (keys.EMBEDDING, keys.HEAD) and (have[0] + 1, *have[1:]) == shape):
            where = "the tower's configuration (--tower)" if name.startswith(keys.TOWER) else "config.json"
            raise CheckpointError(f"{found.named[name].key} has shape {have}, but {where} says {shape}.")
        if not found.named[name].dtype.is_floating_point:
            raise CheckpointError(f"{found.named[name].key} is quantized; import the checkpoint in full precision.")
