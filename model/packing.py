"""Several questions about one picture in one sequence: the picture's positions are shared, the work is a fraction.

Each question sees the picture and itself, never another question, at the positions it would have alone, so the loss is
the loss of the separate sequences. Used by the central training and by the clinics'.
"""

from collections.abc import Sequence
from typing import Any

from model.collate import Encoded
from model.prompts import IGNORE

Group = list[int]  # rows that share a picture


def grouped(rows: Sequence[int], image_of: Sequence[int], most: int, generator: Any) -> list[Group]:
    """Rows in random order, those of one picture in groups of nearly equal size, at most `most` each."""
    by_image: dict[int, Group] = {}
    for row in generator.permutation(len(rows)):
        by_image.setdefault(image_of[rows[int(row)]], []).append(rows[int(row)])
    groups: list[Group] = []
    for members in by_image.values():
        parts = -(-len(members) // most)
        groups += [members[part::parts] for part in range(parts)]
    return [groups[int(i)] for i in generator.permutation(len(groups))]


def shared_prefix(encoded: Sequence[Encoded], image_token: int) -> int:
    """Positions that all rows share: up to the picture's last token (start mark, system prompt, picture)."""
    first = encoded[0].ids
    return len(first) - first[::-1].index(image_token)


def pack(
    encoded: Sequence[Encoded], groups: Sequence[Group], prefix: int, pad_id: int, multiple: int = 1
) -> tuple[Any, Any, Any, Any]:
    """Ids, labels, segments (0 picture, 1.. questions, -1 padding) and positions, each int64 (groups, length).

    `prefix` counts the positions that all rows share: what comes before the picture, and the picture itself.
    """
    import numpy as np
    import torch

    longest = prefix + max(sum(len(encoded[row].ids) - prefix for row in group) for group in groups)
    shape = (len(groups), -(-longest // multiple) * multiple)
    ids, labels = np.full(shape, pad_id), np.full(shape, IGNORE)
    segments, positions = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
    for line, group in enumerate(groups):
        ids[line, :prefix] = encoded[group[0]].ids[:prefix]
        segments[line, :prefix] = 0
        positions[line, :prefix] = np.arange(prefix)
        start = prefix
        for number, row in enumerate(group, 1):
            item = encoded[row]
            part = slice(start, start + len(item.ids) - prefix)
            ids[line, part], labels[line, part] = item.ids[prefix:], item.labels[prefix:]
            segments[line, part], positions[line, part] = number, np.arange(prefix, len(item.ids))
            start = part.stop
    ids_, labels_, segments_, positions_ = (torch.from_numpy(a).long() for a in (ids, labels, segments, positions))
    return ids_, labels_, segments_, positions_


def visible(segments: Any) -> Any:
    """Bool (groups, 1, length, length): position i sees j if j is not later and is picture or of i's own question."""
    import torch

    length = segments.shape[1]
    order = torch.ones((length, length), dtype=torch.bool, device=segments.device).tril()
    mine, other = segments[:, :, None], segments[:, None, :]
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)  # padding must see something
    return ((order & ((other == 0) | (other == mine)) & (other >= 0)) | itself)[:, None]
