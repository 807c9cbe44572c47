"""Write a quantized copy of a model folder for ONNX Runtime: graphs, embeddings, tokenizer and a manifest.

The copy is made in a hidden folder beside the target and renamed when it is complete; a run that was cut off goes on
with the parts that are finished. Weights are read layer by layer. The vision graph, `lm_head` and the attention's k and
v keep 8 bits where the rest of the decoder has 4: for k and v that is 2 % more bytes of a 1.5B, and leaves a third of
the error (NOTES.md). Adapters are no part of it, they are given at run time. Not covered: calibration on data (none is
used), graphs of other programs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model import files, llava, manifest, onnx_decoder, onnx_vision
from model.llava import ModelError
from model.onnx_graph import Graph
from model.onnx_source import Source, config, end_ids

BITS, BLOCKS = (4, 8, 32), (32, 64, 128, 256)
_BLOCK = {4: 256, 8: 128}  # by bits; 256: the longest, no less accurate than llama.cpp's Q4_0 (NOTES.md)
DONE = "finished.json"
_COPIED = ("config.json", "generation_config.json", "afya.json", "chat_template.jinja")
_COPIED_KINDS = ("token", "special", "processor", "preprocessor", "added", "vocab", "merges")
_PACKAGES = ("onnx", "onnxruntime", "onnxruntime-gpu", "bitsandbytes", "numpy", "torch", "transformers")
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """How to quantize: bits and block of the decoder; bits of vision, head, k and v; block of vision."""

    bits: int
    block: int
    vision_bits: int
    head_bits: int
    keys_bits: int
    vision_block: int


def plan(bits: int, block: int | None = None) -> Plan:
    """A plan with its defaults; 32 bits quantize nothing. Raises ModelError for what is not offered."""
    inner, block = 32 if bits == 32 else 8, block or _BLOCK.get(bits, 128)
    found = Plan(bits, block, inner, inner, inner, min(block, 128))
    if bits not in BITS or block not in BLOCKS:
        raise ModelError(f"{bits} bits in blocks of {block} is not offered; bits are {BITS}, blocks {BLOCKS}.")
    return found


def quantize(model: Path, out: Path, how: Plan, progress: Progress = lambda count: None) -> dict[str, Any]:
    """Write the folder `out` and return its manifest; `progress` gets the number of parameters done since last time.

    Raises ModelError for a model without graph here or an `out` that holds something else, OSError where the disk
    refuses: what is finished is kept for the next run.
    """
    model, out = Path(model), Path(out)
    settings = config(model)
    onnx_vision.check(settings)
    shape = onnx_decoder.shape_of(settings["text_config"])
    identity = {"base_sha256": llava.base_sha256(model), "format": manifest.FORMAT, **dataclasses.asdict(how)}
    identity["backend"] = "onnx"
    if out.exists():
        return already(out, identity)
    partial = out.parent / f".{out.name}.partial"
    finished = _resume(partial, identity)
    source = Source(model)
    for part in ("vision", "decoder", "embeddings"):
        names = [f"{part}.safetensors"] if part == "embeddings" else [f"{part}.onnx", f"{part}.onnx.data"]
        if not _unchanged(partial, finished, names):
            _make(part, partial, source, settings, shape, how, progress)
            finished["files"] |= manifest.describe(partial, names)
            files.write_atomic(partial / DONE, json.dumps(finished).encode())
    facts = _facts(model, source, settings, shape, identity)
    copied = copy_texts(model, partial)
    listed = {**finished["files"], **manifest.describe(partial, copied)}
    (partial / DONE).unlink()
    manifest.write(partial, {**facts, "files": listed})
    files.sync_folder(partial)
    os.replace(partial, out)
    files.sync_folder(out.parent)
    return manifest.read(out)


def already(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a folder that is the wanted one already."""
    if not manifest.is_quantized(out):
        raise ModelError(f"{out} exists and is no quantized model; choose another folder with --out.")
    found = manifest.verify(out)
    if any(found.get(key) != value for key, value in identity.items()):
        raise ModelError(f"{out} holds another model or other bits; choose another folder with --out.")
    return found


def _resume(partial: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same work finished; anything else in the hidden folder goes."""
    try:
        found = json.loads((partial / DONE).read_bytes())
        if found["identity"] == identity:
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return {"identity": identity, "files": {}}


def _unchanged(partial: Path, finished: dict[str, Any], names: list[str]) -> bool:
    listed = {name: finished["files"].get(name) for name in names}
    return all((partial / name).is_file() for name in names) and manifest.describe(partial, names) == listed


def _make(part: str, folder: Path, source: Source, settings: Any, shape: Any, how: Plan, progress: Progress) -> None:
    """One part of the folder: a graph with its weights, or the table of embeddings."""
    if part == "embeddings":
        _embeddings(folder, source, how)
        return
    vision = part == "vision"
    graph = Graph(folder, part, how.vision_bits if vision else how.bits, how.vision_block if vision else how.block)
    try:
        if vision:
            onnx_vision.write(graph, source, settings, progress)
        else:
            bits = {"head": how.head_bits, "k": how.keys_bits, "v": how.keys_bits}
            onnx_decoder.write(graph, source, shape, bits, progress)
    except BaseException:
        graph.abandon()
        raise
    graph.save()


def _embeddings(folder: Path, source: Source, how: Plan) -> None:
    """The table of token embeddings in half precision (float32 at 32 bits); its rows are read from the disk."""
    from safetensors.numpy import save_file

    kind = np.float32 if how.bits == 32 else np.float16
    path = folder / "embeddings.safetensors"
    save_file({"embeddings": source.numpy("text.embed_tokens.weight").astype(kind)}, path)
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def copy_texts(model: Path, folder: Path, but: tuple[str, ...] = ()) -> list[str]:
    """Copy tokenizer, processor, configuration and template, `but` some; returns their names."""
    names = sorted(
        path.name
        for path in model.iterdir()
        if path.is_file() and path.name not in but and (path.name in _COPIED or path.name.startswith(_COPIED_KINDS))
    )
    for name in names:
        files.write_atomic(folder / name, (model / name).read_bytes())
    return names


def versions() -> dict[str, str]:
    """Versions of the packages that had a part in it."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _facts(model: Path, source: Source, settings: Any, shape: Any, identity: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says beside the files."""
    inner = int(settings["text_config"]["intermediate_size"])
    return {
        **identity,
        "model": model.resolve().name,
        "parameters": source.parameters(),
        "accuracy_level": 4,
        "calibration": None,
        "decoder": {**dataclasses.asdict(shape), "inner": inner},
        "image_token_id": settings.get("image_token_id", settings.get("image_token_index")),
        "image_tokens": onnx_vision.tokens(settings),
        "end_ids": end_ids(model, settings),
        "versions": versions(),
    }
