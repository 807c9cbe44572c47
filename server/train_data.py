"""Training data: a table of pictures on the training device, encoded rows, and seeded batches of both.

Everything fits in memory at the reference's scale (some thousand rows); streaming of larger sets is not covered here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.collate import Encoded, encode_sample
from model.data import DataError, Sample, load_rgb, read, split_by_group
from model.packing import Group, grouped, pack
from model.prompts import IGNORE
from server.recipe import DataConfig, OptimConfig, Source


def gather(config: DataConfig, folder: Path) -> list[Sample]:
    """All training samples of a recipe, repeats included, without the images that must stay unseen."""
    hidden: set[str] = set()
    for name in config.exclude_images_of:
        hidden |= {sample.group for sample in read(folder / name)}
    samples: list[Sample] = []
    for source in config.sources:
        rows = [row for row in _source(source, folder) if row.group not in hidden]
        rows, _ = split_by_group(rows, config.hold_out, config.hold_out_seed)
        samples += (rows + mirrored(rows) if source.mirror else rows) * source.repeat
    if config.phantom_images:
        from model import phantoms

        names = [n for n, scanner in phantoms.SCANNERS.items() if scanner.standard]
        samples += phantoms.make(config.phantom_images, names, seed=config.phantom_seed)
    if not samples:
        raise DataError(f"No training row is left below {folder}; check data.sources and the exclusions of the recipe.")
    return samples


def _source(source: Source, folder: Path) -> list[Sample]:
    path = folder / source.file
    if source.optional and not path.exists():
        return []
    return read(path, folder / source.images)


SWAP = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}


def mirrored(rows: Sequence[Sample]) -> list[Sample]:
    """The rows as seen in a mirror: pictures flipped, left and right exchanged in questions and answers.

    Rows that share a picture share its flipped copy.
    """
    flipped: dict[str, np.ndarray] = {}
    made = []
    for row in rows:
        if row.group not in flipped:
            flipped[row.group] = np.ascontiguousarray(load_rgb(row)[:, ::-1])
        question, answer = _swap_sides(row.question), _swap_sides(row.answer)
        name, image = f"{row.id}-mirrored", flipped[row.group]
        made.append(replace(row, id=name, image=image, question=question, answer=answer))
    return made


def _swap_sides(text: str) -> str:
    return re.sub(r"\b(?:left|right|Left|Right)\b", lambda found: SWAP[found.group()], text)


@dataclass
class Bank:
    """Pictures uint8 (images, 3, S, S) on the device, encoded rows and the picture of each row."""

    pictures: Any
    encoded: list[Encoded]
    samples: list[Sample]
    image_of: list[int]
    prefix: int
    pad_id: int

    def batch(self, groups: Sequence[Group], multiple: int = 1) -> dict[str, Any]:
        """Packed groups, padded to `multiple` tokens, for `server.objective.labelled_logits`, on the device.

        `pictures` float32 in [0, 1], one for each group; `places` and `targets` say which flattened position predicts
        which labelled token.
        """
        import torch

        ids, labels, segments, positions = pack(self.encoded, groups, self.prefix, self.pad_id, multiple)
        row, column = (labels != IGNORE).nonzero(as_tuple=True)
        parts = {
            "input_ids": ids,
            "segments": segments,
            "positions": positions,
            "places": row * labels.shape[1] + column - 1,
            "targets": labels[row, column],
            "pictures": torch.tensor([self.image_of[group[0]] for group in groups]),
        }
        device = self.pictures.device
        if device.type == "cuda":
            parts = {name: part.pin_memory() for name, part in parts.items()}
        batch = {name: part.to(device, non_blocking=True) for name, part in parts.items()}
        batch["pictures"] = self.pictures[batch["pictures"]].float() / 255
        return batch


def build_bank(samples: Sequence[Sample], processor: Any, image_tokens: int, device: Any) -> Bank:
    """Decode, resize and tokenize everything once."""
    import torch

    place: dict[Any, int] = {}
    pictures: list[np.ndarray] = []
    encoded: list[Encoded] = []
    for sample in samples:
        key = id(sample.image) if isinstance(sample.image, np.ndarray) else sample.image
        if key not in place:
            place[key] = len(pictures)
            pictures.append(resize(load_rgb(sample), processor))
        encoded.append(encode_sample(sample, processor.tokenizer, image_tokens, place[key]))
    return Bank(
        pictures=torch.from_numpy(np.stack(pictures)).to(device),
        encoded=encoded,
        samples=list(samples),
        image_of=[item.image for item in encoded],
        prefix=image_tokens + 1,
        pad_id=processor.tokenizer.pad_token_id,
    )


def resize(picture: np.ndarray, processor: Any) -> np.ndarray:
    """The processor's own resizing, kept as uint8 (3, S, S); normalisation happens on the device."""
    values = processor.image_processor(images=[picture], do_rescale=False, do_normalize=False, return_tensors="np")
    return np.clip(np.rint(values["pixel_values"][0]), 0, 255).astype(np.uint8)


def normalise(pictures: Any, processor: Any) -> Any:
    """Pictures in [0, 1] to the tower's input range, as the processor does it."""
    import torch

    mean = torch.tensor(processor.image_processor.image_mean, device=pictures.device).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std, device=pictures.device).view(1, 3, 1, 1)
    return (pictures - mean) / std


def epoch_rows(samples: Sequence[Sample], parts: int, epoch: int) -> list[int]:
    """Rows of one epoch: all but the synthetic ones, and of those one of `parts` equal parts, in turn."""
    synthetic = [row for row, sample in enumerate(samples) if sample.source == "phantoms"]
    share = len(synthetic) // parts
    real = [row for row, sample in enumerate(samples) if sample.source != "phantoms"]
    return real + synthetic[epoch % parts :: parts][:share]


def epoch_batches(bank: Bank, config: OptimConfig, parts: int, epoch: int, rank: int, world: int) -> list[list[Group]]:
    """This process's share of each batch of one epoch: groups of rows; the order depends on seed and epoch alone.

    A batch holds `config.batch` groups over all processes; what is left over at the end of an epoch is dropped.
    """
    generator = np.random.default_rng([config.seed, epoch])
    groups = grouped(epoch_rows(bank.samples, parts, epoch), bank.image_of, config.pack, generator)
    size = min(config.batch, len(groups) // world * world)
    return [groups[start : start + size][rank::world] for start in range(0, len(groups) - size + 1, size)]


def steps(bank: Bank, config: OptimConfig, parts: int) -> list[int]:
    """Optimiser steps of each epoch."""
    by_part = [len(epoch_batches(bank, config, parts, part, 0, 1)) for part in range(min(parts, config.epochs))]
    return [by_part[epoch % parts] for epoch in range(config.epochs)]
