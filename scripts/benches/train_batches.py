"""Batches that every recipe of the training bench sees alike: dialogues about real pictures, or random tokens.

A row is a picture's tokens and at most 128 of text: questions on one picture joined to a dialogue, as LLaVA does.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TEXT = 128  # text tokens of a row, those of the template included


def make(model: Path, data: Path | None, images: Path | None, steps: int, batch: int, file: Path) -> None:
    """Write `steps` batches of `batch` rows as safetensors: ids, labels int64 and pictures uint8 of each step."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model, local_files_only=True, backend="pil")
    tokens, image_id = _image_tokens(model)
    rows = (
        _real(model, processor, tokens, data, images) if data else _random(processor, tokens, image_id, steps * batch)
    )
    made: dict[str, Any] = {}
    for step in range(steps):
        ids, labels = np.zeros((batch, tokens + TEXT), np.int64), np.full((batch, tokens + TEXT), -100)
        pictures = []
        for line in range(batch):
            row_ids, row_labels, picture = rows[(step * batch + line) % len(rows)]
            ids[line, : len(row_ids)], labels[line, : len(row_labels)] = row_ids, row_labels
            pictures.append(picture)
        parts = {"ids": ids, "labels": labels, "pictures": np.stack(pictures)}
        made |= {f"{step}.{name}": torch.from_numpy(part) for name, part in parts.items()}
    save_file(made, file)


def read(file: Path) -> list[dict[str, Any]]:
    """The batches of a file, on the CPU."""
    from safetensors.torch import load_file

    parts = load_file(file)
    steps = 1 + max(int(name.split(".")[0]) for name in parts)
    return [{name: parts[f"{step}.{name}"] for name in ("ids", "labels", "pictures")} for step in range(steps)]


def _image_tokens(model: Path) -> tuple[int, int]:
    from transformers import LlavaConfig

    config = LlavaConfig.from_pretrained(model, local_files_only=True)
    return int(config.image_seq_length), int(config.image_token_index)


def _real(model: Path, processor: Any, tokens: int, data: Path, images: Path | None) -> list[Any]:
    """Dialogues in a seeded order; pictures are resized once."""
    from model.data import load_rgb, read
    from model.prompts import template_of
    from server.train_data import resize

    by_image: dict[Any, list[Any]] = {}
    for sample in read(data, images):
        by_image.setdefault(sample.image, []).append(sample)
    template, rows = template_of(model), []
    for samples in by_image.values():
        picture = resize(load_rgb(samples[0]), processor)
        for ids, labels in _dialogues(samples, processor.tokenizer, template, tokens):
            rows.append((ids, labels, picture))
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[int(number)] for number in order]


def _dialogues(samples: list[Any], tokenizer: Any, template: Any, tokens: int) -> Iterator[tuple[list[int], list[int]]]:
    from model.prompts import encode_conversation

    pairs: list[tuple[str, str | None]] = []
    for sample in samples:
        longer = [*pairs, (sample.question, sample.answer)]
        if pairs and len(encode_conversation(tokenizer, template, longer, tokens)[0]) > tokens + TEXT:
            yield encode_conversation(tokenizer, template, pairs, tokens)
            longer = [(sample.question, sample.answer)]
        pairs = longer
    yield encode_conversation(tokenizer, template, pairs, tokens)


def _random(processor: Any, tokens: int, image_id: int, count: int) -> list[Any]:
    generator = np.random.default_rng(0)
    side = processor.image_processor.size.get("height") or processor.image_processor.size["shortest_edge"]
    rows = []
    for _ in range(min(count, 256)):
        text = generator.integers(3, image_id, TEXT)
        ids = [1, *([image_id] * tokens), *text[1:].tolist()]
        labels = [-100] * (tokens + TEXT // 2) + ids[-TEXT // 2 :]
        rows.append((ids, labels, generator.integers(0, 256, (3, side, side), dtype=np.uint8)))
    return rows
