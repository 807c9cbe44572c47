"""Keys and values of the ONNX conversations answered last, as arrays: the next turn costs only its new tokens.

The same rules as `model.prefix_cache`: entries of another picture are never looked at, the entry used longest ago goes
first, the newest always stays, and a limit of 0 keeps nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from model.prefix_cache import common

_Key = tuple[str, tuple[int, ...]]


class Kept:
    """At most `limit` bytes, and always the entry kept last."""

    def __init__(self, limit: int) -> None:
        """Nothing is kept yet."""
        self.limit = limit
        self._entries: OrderedDict[_Key, Sequence[Any]] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Bytes held now."""
        return sum(int(part.nbytes) for parts in self._entries.values() for part in parts)

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, picture: str, ids: Sequence[int]) -> int:
        """How many first ids are kept about this picture."""
        return self._best(picture, ids)[0]

    def take(self, picture: str, ids: Sequence[int]) -> Sequence[Any]:
        """Keys and values of the entry that `longest` found, all of its positions. Raises KeyError where none is."""
        _, key = self._best(picture, ids)
        if key is None:
            raise KeyError(picture)
        self._entries.move_to_end(key)
        return self._entries[key]

    def keep(self, picture: str, ids: Sequence[int], parts: Sequence[Any]) -> None:
        """Keep these arrays, not copied; entries that only hold the beginning of the same row go."""
        if not self.limit:
            return
        whole = tuple(ids)
        for key in [key for key in self._entries if key[0] == picture and key[1] == whole[: len(key[1])]]:
            del self._entries[key]
        self._entries[picture, whole] = parts
        while len(self._entries) > 1 and self.bytes > self.limit:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything; call when the adapter changes."""
        self._entries.clear()

    def _best(self, picture: str, ids: Sequence[int]) -> tuple[int, _Key | None]:
        found = ((common(key[1], ids), key) for key in self._entries if key[0] == picture)
        return max(found, key=lambda pair: pair[0], default=(0, None))
