"""Training data on the training device: a table of pictures and padded token rows, and seeded batches of both.

Everything fits in memory at the reference's scale (some thousand rows); streaming of larger sets is not covered here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.collate import Encoded, encode_sample, pad
from model.data import DataError, Sample, load_rgb, read
from server.recipe import DataConfig, Source


def gather(config: DataConfig, folder: Path) -> list[Sample]:
    """All training samples of a recipe, repeats included, without the images that must stay unseen."""
    hidden: set[str] = set()
    for name in config.exclude_images_of:
        hidden |= {_key(sample) for sample in read(folder / name)}
    samples: list[Sample] = []
    for source in config.sources:
        samples += _source(source, folder)
    samples = [s for s in samples if _key(s) not in hidden and not _excluded(s, config.exclude_modality)]
    if config.phantom_images:
        from model import phantoms

        names = [n for n, scanner in phantoms.SCANNERS.items() if not scanner.unseen]
        samples += phantoms.make(config.phantom_images, names, seed=config.phantom_seed) * config.phantom_repeat
    if not samples:
        raise DataError(f"No training row is left below {folder}; check data.sources and the exclusions of the recipe.")
    return samples


def _source(source: Source, folder: Path) -> list[Sample]:
    path = folder / source.file
    if source.optional and not path.exists():
        return []
    return read(path, folder / source.images) * source.repeat


def _key(sample: Sample) -> str:
    return sample.group


def _excluded(sample: Sample, modality: str) -> bool:
    return bool(modality) and sample.meta.get("modality") == modality


@dataclass
class Bank:
    """Pictures uint8 (images, 3, S, S), token rows and labels int64 (rows, length), lengths, and the picture of each row."""

    pictures: Any
    ids: Any
    labels: Any
    lengths: list[int]
    image_of: Any
    samples: list[Sample]

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """Rows cut to the longest of them; pictures float32 in [0, 1]."""
        import torch

        length = max(self.lengths[row] for row in rows)
        index = torch.tensor(list(rows), device=self.ids.device)
        pictures = self.pictures[self.image_of[index]].float() / 255
        return {"input_ids": self.ids[index, :length], "labels": self.labels[index, :length], "pictures": pictures}


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
    padded = pad(encoded, processor.tokenizer.pad_token_id)
    return Bank(
        pictures=torch.from_numpy(np.stack(pictures)).to(device),
        ids=padded["input_ids"].to(device),
        labels=padded["labels"].to(device),
        lengths=[len(item.ids) for item in encoded],
        image_of=torch.tensor([item.image for item in encoded], device=device),
        samples=list(samples),
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


def epoch_batches(rows: int, batch: int, seed: int, epoch: int, rank: int, world: int) -> Iterator[list[int]]:
    """This process's share of each batch of one epoch; the order depends on seed and epoch alone. Drops the rest."""
    order = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
    for start in range(0, rows - batch + 1, batch):
        yield order[start : start + batch][rank::world]
