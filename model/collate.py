"""Samples to training tensors: encode with labels masked by construction, pad, stack pixels.

Used by the central training and by the clinics' LoRA training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.data import Sample, load_rgb
from model.prompts import AFYA, IGNORE, Template, encode


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels (same length) of one sample; `image` indexes the table of pictures."""

    ids: list[int]
    labels: list[int]
    image: int


def encode_sample(
    sample: Sample, tokenizer: Any, image_tokens: int, image: int = 0, template: Template = AFYA
) -> Encoded:
    """Encode a sample with its answer; only the answer and the end marker carry labels."""
    turns = [*sample.history, (sample.question, "")]
    ids, labels = encode(tokenizer, template, turns, image_tokens, sample.answer)
    return Encoded(ids, labels, image)


def pad(batch: Sequence[Encoded], pad_id: int, left: bool = False, multiple: int = 1) -> dict[str, Any]:
    """Pad to the longest, rounded up to `multiple`: input_ids, attention_mask, labels int64 (batch, length)."""
    import torch

    length = -(-max(len(item.ids) for item in batch) // multiple) * multiple
    ids = torch.full((len(batch), length), pad_id, dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORE, dtype=torch.long)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    for row, item in enumerate(batch):
        where = slice(length - len(item.ids), length) if left else slice(0, len(item.ids))
        ids[row, where] = torch.tensor(item.ids)
        labels[row, where] = torch.tensor(item.labels)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pixel_values(pictures: Sequence[np.ndarray], processor: Any) -> Any:
    """Pixel tensor float32 (n, 3, H, W) of RGB arrays, by the model's own image processor."""
    return processor.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]


def collate(
    samples: Sequence[Sample], processor: Any, image_tokens: int, left: bool = False, template: Template = AFYA
) -> dict[str, Any]:
    """Batch for `LlavaForConditionalGeneration`: input_ids, attention_mask, labels, pixel_values."""
    encoded = [encode_sample(sample, processor.tokenizer, image_tokens, template=template) for sample in samples]
    batch = pad(encoded, processor.tokenizer.pad_token_id, left)
    batch["pixel_values"] = pixel_values([load_rgb(sample) for sample in samples], processor)
    return batch
