"""Packed questions give the loss and the logits of separate sequences (reference: transformers, one row at a time)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.collate import collate, encode_sample
from model.data import Sample
from model.packing import grouped, pack, visible
from model.prompts import IGNORE
from tests.tiny import tiny_model

QUESTIONS = [("Is it CT?", "No"), ("What modality is used?", "X-Ray"), ("Which side?", "Left lung"), ("Nodule?", "Yes")]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = tiny_model(tmp_path_factory.mktemp("tiny"))
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for _ in range(2)]
    return [Sample(str(i), pictures[i // 2], q, a, "open", str(i // 2), "t") for i, (q, a) in enumerate(QUESTIONS)]


@torch.no_grad()
def test_packed_losses_equal_separate_ones(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    rows = samples()
    separate = []
    for row in rows:
        batch = collate([row], processor, image_tokens=4)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        separate.append(torch.nn.functional.cross_entropy(logits[0], batch["labels"][0, 1:], ignore_index=IGNORE))
    encoded = [encode_sample(row, processor.tokenizer, 4) for row in rows]
    ids, labels, segments, positions = pack(encoded, [[0, 1], [3, 2]], 5, processor.tokenizer.pad_token_id, multiple=16)
    assert ids.shape[1] % 16 == 0
    pixels = torch.cat([collate([rows[i]], processor, 4)["pixel_values"] for i in (0, 3)])
    output = model(input_ids=ids, attention_mask=visible(segments), position_ids=positions, pixel_values=pixels)
    for (line, number), expected in zip([(0, 1), (0, 2), (1, 1), (1, 2)], [0, 1, 3, 2], strict=True):
        mine = torch.where(segments[line, 1:] == number, labels[line, 1:], IGNORE)
        loss = torch.nn.functional.cross_entropy(output.logits[line, :-1], mine, ignore_index=IGNORE)
        assert float(loss) == pytest.approx(float(separate[expected]), abs=1e-5)


def test_groups_hold_every_row_once_and_share_a_picture() -> None:
    image_of = [0] * 11 + [1] * 3 + [2]
    groups = grouped(list(range(15)), image_of, 8, np.random.default_rng(0))
    assert sorted(row for group in groups for row in group) == list(range(15))
    assert sorted(len(group) for group in groups) == [1, 3, 5, 6]
    assert all(len({image_of[row] for row in group}) == 1 for group in groups)


def test_collate_pads_masks_and_stacks(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    batch = collate(samples(), loaded[1], image_tokens=4)
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert bool((batch["labels"][batch["attention_mask"] == 0] == IGNORE).all())
