"""Batches of LLaVA conversations: order by seed alone, rows of like length together, tensors without waiting.

Rows are tokenized and pictures decoded in worker processes while the device computes; nothing is kept of a row after
its step, so 500,000 rows need no more memory than 500. The order of an epoch depends on seed and epoch alone, so a
resumed run goes on with exactly the batches that were left.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.conversations import Conversation
from model.data import DataError
from model.prompts import IGNORE, Template, encode_conversation

_WINDOW = 64  # batches whose rows are sorted by length together: little padding, still well mixed


@dataclass(frozen=True)
class Row:
    """Token ids and labels (same length) of one conversation and its picture uint8 (3, S, S), None without one."""

    ids: list[int]
    labels: list[int]
    picture: np.ndarray | None


class Rows:
    """Conversations as training rows, made when asked for; a map-style dataset for PyTorch's loader."""

    def __init__(
        self, conversations: Sequence[Conversation], processor: Any, template: Template, image_tokens: int, longest: int
    ) -> None:
        self.conversations, self.processor, self.template = conversations, processor, template
        self.image_tokens, self.longest = image_tokens, longest

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, number: int) -> Row:
        """The row, cut at `longest` tokens. Raises DataError naming the row and its picture."""
        said = self.conversations[number]
        ids, labels = self.tokens(number)
        picture = None if said.image is None else resized(Path(said.image), said.row, self.processor)
        return Row(ids[: self.longest], labels[: self.longest], picture)

    def tokens(self, number: int) -> tuple[list[int], list[int]]:
        """Token ids and labels of a row, uncut."""
        said = self.conversations[number]
        tokens = 0 if said.image is None else self.image_tokens
        return encode_conversation(self.processor.tokenizer, self.template, said.pairs, tokens)

    def lengths(self) -> np.ndarray:
        """A stand-in for the length of every row: characters of its text; rows without a picture count as shorter."""
        text = [sum(len(q) + len(a) for q, a in said.pairs) for said in self.conversations]
        return np.array([n - 10**9 * (said.image is None) for n, said in zip(text, self.conversations, strict=True)])


def resized(path: Path, row: int, processor: Any) -> np.ndarray:
    """A picture as the model's processor pads and resizes it, uint8 (3, S, S). Raises DataError."""
    from model.data import Sample, load_rgb
    from server.train_data import resize

    return resize(load_rgb(Sample(str(row), path, "", "", "unknown", "", "")), processor)


def epoch_steps(lengths: np.ndarray, batch: int, parts: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """Row numbers of an epoch: for each step `parts` lists (processes x accumulation) of `batch` rows each.

    Every row comes once; the last step is filled up with rows from the start of the order.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    whole = batch * parts
    order = np.concatenate([order, np.resize(order, -len(order) % whole)])
    batches: list[list[int]] = []
    for start in range(0, len(order), batch * _WINDOW * parts):
        window = order[start : start + batch * _WINDOW * parts]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += window.reshape(-1, batch).tolist()
    places = generator.permutation(len(batches) // parts)
    return [batches[int(place) * parts : (int(place) + 1) * parts] for place in places]


def tensors(rows: Sequence[Row], image_token: int, pad_id: int, multiple: int, side: int) -> dict[str, Any]:
    """A batch for `server.stage_objective.StageObjective`, on the CPU, padded on the right to `multiple` tokens.

    input_ids int64 (rows, length); places and targets int64 (labels): where in the flattened rows a labelled token is
    predicted, and which it is; picture_places int64 (all picture tokens); pixel_values uint8 (pictures, 3, S, S), one
    blank picture where no row has any, so that every process does the same work.
    """
    import torch

    length = -(-max(len(row.ids) for row in rows) // multiple) * multiple
    ids, labels = np.full((len(rows), length), pad_id), np.full((len(rows), length), IGNORE)
    for line, row in enumerate(rows):
        ids[line, : len(row.ids)], labels[line, : len(row.labels)] = row.ids, row.labels
    labels[:, 0] = IGNORE  # nothing predicts the first token
    at, column = np.nonzero(labels != IGNORE)
    pictures = [row.picture for row in rows if row.picture is not None] or [np.full((3, side, side), 127, np.uint8)]
    parts = {
        "input_ids": ids,
        "places": at * length + column - 1,
        "targets": labels[at, column],
        "picture_places": np.flatnonzero(ids == image_token),
        "pixel_values": np.stack(pictures),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}


def loader(rows: Rows, batches: Sequence[Sequence[int]], settings: dict[str, Any], workers: int) -> Iterator[Any]:
    """Batches in order from `workers` processes (0: this one), a few ahead of the training."""
    from functools import partial

    from torch.utils.data import DataLoader

    made = DataLoader(
        rows,
        batch_sampler=[list(batch) for batch in batches],
        collate_fn=partial(tensors, **settings),
        num_workers=min(workers, len(batches)),
        prefetch_factor=4 if workers and batches else None,
        pin_memory=False,
    )
    return iter(made)


def check_rows(conversations: Sequence[Conversation], where: Path, image_tokens: int, longest: int) -> None:
    """Raise DataError when there is nothing to train on, or rows are cut before their question."""
    if longest <= image_tokens:
        raise DataError(
            f"stage.max_length is {longest}, and a picture alone takes {image_tokens} tokens of this model; raise it."
        )
    if not conversations:
        raise DataError(f"{where} has no usable row; run `afya-server data check {where}` to see why.")
