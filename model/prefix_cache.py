"""Keys and values of the conversations answered last, so that the next turn costs only its new tokens.

An entry is one picture with the ids of a prompt (and answer) about it. `longest` finds the entry that begins with the
most ids of a new prompt: the tokens of the picture are the same ids for every picture, so entries of another picture
are never looked at. The number of bytes is bounded; the entry used longest ago goes first, the newest always stays.
Not covered: use by two threads at once, and noticing that the weights changed (call `clear`).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.decode import Layers, cut


@dataclass(frozen=True)
class Kept:
    """The ids of one row about the picture with this digest, and their keys and values."""

    picture: str
    ids: tuple[int, ...]
    layers: Layers
    bytes: int  # of keys and values


def digest(picture: np.ndarray) -> str:
    """What tells pictures apart: SHA-256 over shape and bytes of a uint8 array."""
    return hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences have in common from the start."""
    first, second = tuple(first), tuple(second)
    same, most = 0, min(len(first), len(second))
    while same < most:  # halving: comparing slices is much faster than comparing ids one by one
        middle = (same + most + 1) // 2
        if first[same:middle] == second[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same


class PrefixCache:
    """At most `limit` bytes of keys and values, and always those kept last; a limit of 0 keeps nothing."""

    def __init__(self, limit: int) -> None:
        """An empty cache."""
        self.limit = limit
        self.bytes = 0  # held now
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def count(self, picture: str, token: int) -> int:
        """How often `token` is in the entries of a picture (its image tokens, say); 0 where there is no entry."""
        return next((entry.ids.count(token) for entry in self._entries.values() if entry.picture == picture), 0)

    def longest(self, picture: str, ids: Sequence[int], least: int) -> Layers | None:
        """Keys and values of the most first ids that are kept, never of all; None where that is under `least`."""
        best: Kept | None = None
        size = 0
        for entry in self._entries.values():
            if entry.picture == picture and (shared := min(common(entry.ids, ids), len(ids) - 1)) > size:
                best, size = entry, shared
        if best is None or size < least:
            return None
        self._entries.move_to_end((best.picture, best.ids))
        return cut(best.layers, 0, size)

    def keep(self, picture: str, ids: Sequence[int], layers: Layers, *, owned: bool = False) -> None:
        """Keep the layers of these ids, a copy unless `owned`; entries that only hold a row's beginning go."""
        if not self.limit:
            return
        whole = tuple(ids)
        for key, entry in list(self._entries.items()):
            if entry.picture == picture and entry.ids == whole[: len(entry.ids)]:
                self._drop(key)
        if not owned:
            layers = [(keys.detach().clone(), values.detach().clone()) for keys, values in layers]
        size = sum(part.numel() * part.element_size() for pair in layers for part in pair)
        self._entries[picture, whole] = Kept(picture, whole, layers, size)
        self.bytes += size
        while len(self._entries) > 1 and self.bytes > self.limit:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: tuple[str, tuple[int, ...]]) -> None:
        self.bytes -= self._entries.pop(key).bytes

    def clear(self) -> None:
        """Forget everything; call when the weights or the adapter change."""
        self._entries.clear()
        self.bytes = 0
