"""Import a published LLaVA checkpoint as a folder that `model.llava` and transformers load.

Read are the originals (`tiny_llava`, `tinyllava`, `llava_mistral`, `llava`), parts of them (projector, LoRA) on top of
a base, and folders already converted to transformers' Llava. Weights go from file to file one tensor at a time, so a
7B model needs little more memory than one of its files. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import checkpoint_config as configs
from model import checkpoint_keys as keys
from model import checkpoint_tokenizer as tokens
from model import checkpoint_tower, files
from model.checkpoint_facts import FACTS, ImportReport, provenance
from model.checkpoint_plan import Weights, collect, complete, needs_base
from model.checkpoint_source import CheckpointError, Reader, read_json
from model.checkpoint_tower import TOWER_WEIGHTS, Comparison
from model.checkpoint_writer import Piece, write
from model.prompts import SETTINGS

_ROOM = 64 * 2**20  # bytes of disk beside the weights: tokenizer, index, the file system's own
_TYPES = ("float32", "float16", "bfloat16")


@dataclass
class _Job:
    """One import on its way: the folders, the configuration that counts, and what was found so far."""

    src: Path
    base: Path | None
    source: dict[str, Any]
    converted: Path | None
    weights: Weights
    tower: configs.Tower | None
    comparison: Comparison
    config: Any = None
    image_id: int = 0
    processor: Any = None


def import_checkpoint(
    src: Path,
    out: Path,
    *,
    tower: Path | None = None,
    tower_weights: str = "auto",
    base: Path | None = None,
    preset: str | None = None,
    template: str | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Write the model in `src` to the new folder `out`; `progress` gets (bytes written, bytes in all).

    `tower` is the folder of the vision tower, `tower_weights` one of "auto", "checkpoint", "tower"; `base` the model
    that a LoRA or projector folder was trained on; `dtype` "float32", "float16" or "bfloat16" (the checkpoint's own by
    default). Raises CheckpointError, or PresetMissing for an unknown `preset`; `out` is then not there.
    """
    began = time.perf_counter()
    src, out, base = Path(src), Path(out), None if base is None else Path(base)
    _check(src, out, base, tower_weights, dtype)
    from model import llava

    llava.prepare_environment()
    facts = provenance(src, base, preset)
    with Reader() as reader, Reader() as second, Reader() as third, llava.quiet_library():
        job = _prepare(src, base, facts, tower, tower_weights, reader)
        kind = job.weights.named[keys.EMBEDDING].dtype if dtype is None else _type(dtype)
        pieces = [_piece(job, name, kind, reader, second, third) for name in _in_file_order(job.weights)]
        named = template or facts.get("template") or _template(job)
        _build(job, out, pieces, kind, {**facts, "template": named}, progress)
    return _report(job, out, pieces, str(kind).removeprefix("torch."), named, time.perf_counter() - began)


def _build(job: _Job, out: Path, pieces: list[Piece], kind: Any, facts: dict[str, Any], progress: Any) -> None:
    """Write everything under a temporary name beside `out` and rename it; a failure leaves nothing."""
    _room(out.parent, sum(piece.nbytes for piece in pieces))
    work = out.parent / f".{out.name}.partial"
    try:
        _write(job, work, pieces, kind, facts, progress)
        os.rename(work, out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}; nothing was imported.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    files.sync_folder(out.parent)


def _check(src: Path, out: Path, base: Path | None, tower_weights: str, dtype: str | None) -> None:
    """Refuse what cannot work before anything is read."""
    for folder in (src, base):
        if folder is not None and not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder; give the one that holds the checkpoint.")
    if out.exists():
        raise CheckpointError(f"{out} is there already; give a new folder with --out.")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out.parent} is not there; create it or give another --out.")
    if tower_weights not in TOWER_WEIGHTS:
        raise CheckpointError(f"--tower-weights {tower_weights} is not offered; choose {', '.join(TOWER_WEIGHTS)}.")
    if dtype is not None and dtype not in _TYPES:
        raise CheckpointError(f"Weights of type {dtype} are not offered; choose {', '.join(_TYPES)}.")


def _type(dtype: str) -> Any:
    import torch

    return getattr(torch, dtype)


def _prepare(
    src: Path, base: Path | None, facts: dict[str, Any], tower: Path | None, choice: str, reader: Reader
) -> _Job:
    """Read all headers and settle configuration, tower, tokenizer; every misfit is found here."""
    own = read_json(src / "config.json")
    below = read_json(base / "config.json") if base is not None and needs_base(src) else {}
    weights = collect(src, base, reader)
    if keys.EMBEDDING not in weights.named:
        raise CheckpointError(f"{src} holds no word embeddings, so it is no whole model; give --base.")
    converted = next((p for p, c in ((src, own), (base, below)) if p is not None and configs.is_converted(c)), None)
    source = below | own
    if not source:
        raise CheckpointError(f"{src} holds no config.json; copy all files of the checkpoint.")
    found = checkpoint_tower.find(src, source, tower, facts["preset"], needed=converted is None)
    comparison = checkpoint_tower.choose(weights, found, choice, reader)
    job = _Job(src, base, source, converted, weights, found, comparison)
    _configure(job)
    if keys.HEAD not in weights.named and source.get("tie_word_embeddings") and converted is None:
        weights.named[keys.HEAD] = weights.named[keys.EMBEDDING]
    complete(weights, dict(configs.expected(job.config)), job.config.vision_config.num_hidden_layers)
    return job


def _configure(job: _Job) -> None:
    """Fill in config, image id and processor of a job."""
    rows = job.weights.named[keys.EMBEDDING].shape[0]
    if job.converted is not None:
        job.config = configs.converted_config(job.converted)
        job.processor = tokens.saved_processor(job.converted, job.config)
        job.image_id = int(job.config.image_token_id)
        if job.processor.tokenizer.convert_tokens_to_ids(tokens.IMAGE) != job.image_id:
            raise CheckpointError(f"{job.converted}: <image> is not token {job.image_id}, as config.json says.")
        return
    assert job.tower is not None  # `find` gives one or raises
    text, job.image_id = tokens.tokenizer([p for p in (job.src, job.base) if p is not None], rows)
    last = max(rows, job.image_id + 1)
    job.config = configs.llava_config(job.source, job.tower, last, job.image_id, text.pad_token_id)
    settings = read_json(job.tower.folder / "preprocessor_config.json") if job.tower.folder else {}
    size, aspect = job.config.vision_config.image_size, job.source.get("image_aspect_ratio")
    pictures = tokens.image_processor(job.tower.kind, size, aspect, settings)
    job.processor = tokens.processor(pictures, text, job.config)


def _in_file_order(weights: Weights) -> list[str]:
    """Names so that each file is opened once."""
    order: dict[Path, int] = {}
    for entry in weights.named.values():
        order.setdefault(entry.path, len(order))
    return sorted(weights.named, key=lambda name: order[weights.named[name].path])


def _piece(job: _Job, name: str, kind: Any, reader: Reader, second: Reader, third: Reader) -> Piece:
    """The tensor that is written for a name: read, compared, merged and lengthened when its turn comes."""
    entry, pair = job.weights.named[name], job.weights.lora.get(name)
    vocabulary = job.config.text_config.vocab_size
    grows = name in (keys.EMBEDDING, keys.HEAD) and entry.shape[0] + 1 == vocabulary
    shape = (vocabulary, *entry.shape[1:]) if grows else entry.shape

    def make() -> Any:
        import torch

        tensor = reader.get(entry)
        job.comparison.look(name, tensor, third)
        if pair is not None:
            change = second.get(pair["B"]).float() @ second.get(pair["A"]).float()
            tensor = tensor.float().add(change, alpha=job.weights.scales[name])
        if grows:
            mean = tensor.mean(0, keepdim=True, dtype=torch.float32)
            tensor = torch.cat([tensor, mean.to(tensor.dtype)])
        return tensor

    return Piece(keys.on_disk(name), shape, kind, make)


def _room(folder: Path, total: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < total + _ROOM:
        needs = (total + _ROOM) / 2**30
        raise CheckpointError(f"{folder} has {free / 2**30:.1f} GiB free, the import needs {needs:.1f}; make room.")


def _template(job: _Job) -> str:
    """Conversation template of a checkpoint that does not name one."""
    if job.processor.tokenizer.convert_tokens_to_ids("<assistant>") not in (None, job.processor.tokenizer.unk_token_id):
        return "afya"
    return "mistral_instruct" if job.config.text_config.model_type == "mistral" else "v1"


def _write(job: _Job, work: Path, pieces: list[Piece], kind: Any, facts: dict[str, Any], progress: Any) -> None:
    """Build the whole folder under its temporary name."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    done, total = 0, sum(piece.nbytes for piece in pieces)

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    write(pieces, work, progress=count)
    folder = job.converted or job.src
    pad = job.processor.tokenizer.pad_token_id
    settings = job.source if job.converted is None else job.config.text_config.to_dict()
    configs.save(work, job.config, configs.generation(folder, settings, pad, job.image_id), kind)
    job.processor.save_pretrained(work)
    tower = job.tower.name if job.tower is not None else None
    noted = {"template": facts["template"], "source": facts["source"], "tower": tower}
    noted |= {name: facts[name] for name in ("revision", "licence")}
    files.write_atomic(work / FACTS, json.dumps(noted, indent=2).encode())
    files.write_atomic(work / SETTINGS, json.dumps({"template": facts["template"]}).encode())
    files.sync_folder(work)


def _report(job: _Job, out: Path, pieces: list[Piece], kind: str, template: str, seconds: float) -> ImportReport:
    seen = job.comparison
    return ImportReport(
        out=out,
        source=str(job.src),
        model_type=str(job.source.get("model_type")),
        template=template,
        dtype=kind,
        parameters=sum(piece.nbytes // piece.dtype.itemsize for piece in pieces),
        bytes=sum(piece.nbytes for piece in pieces),
        image_tokens=configs.patches(job.config),
        image_token_id=job.image_id,
        tower=job.tower.name if job.tower is not None else job.config.vision_config.model_type,
        tower_weights=seen.used,
        tower_compared=seen.compared if seen.others else None,
        tower_different=seen.different if seen.others else None,
        tower_largest_difference=seen.largest if seen.others else None,
        merged=len(job.weights.lora),
        dropped=tuple(job.weights.dropped),
        notes=(*job.weights.notes, *seen.notes()),
        seconds=round(seconds, 2),
    )
