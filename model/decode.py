"""Greedy decoding of a batch with a key-value cache, where rows may join and leave at any position.

A `Batch` holds rows of different length and age: the caches are padded on the left, masks hide the padding, positions
skip it. A row that joins brings the keys and values of its first tokens (`heads` computes those of the picture, once
for each), so only the rest of its prompt is computed. No sampling and no beams: the same question gives the same
answer. Not covered: which keys and values are kept for later (`model.prefix_cache`), text (`model.batching`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Layers = list[tuple[Any, Any]]  # keys and values of each decoder layer, (rows, heads, tokens, width)


@dataclass(frozen=True)
class Step:
    """One chosen token of row `index`: its id, its probability, and why the row ended ("", "stop" or "length")."""

    index: int
    token: int
    probability: float
    finished: str


@dataclass(frozen=True)
class Row:
    """A prompt to answer with at most `limit` tokens; `prefix` holds its first tokens, never all, for one row."""

    index: int
    prompt: Sequence[int]
    limit: int
    prefix: Layers


def encode_pictures(core: Any, processor: Any, pictures: Sequence[np.ndarray]) -> tuple[Any, list[int]]:
    """Projected features (different pictures, tokens, hidden) and, for each given picture, which of them is its own.

    Two entries are the same picture if they are the same array object.
    """
    import torch

    places: dict[int, int] = {}
    for picture in pictures:
        places.setdefault(id(picture), len(places))
    unique = {places[id(picture)]: picture for picture in pictures}
    with torch.no_grad():
        ready = [unique[n] for n in range(len(unique))]
        pixels = processor.image_processor(images=ready, return_tensors="pt")["pixel_values"]
        found = core.model.get_image_features(pixel_values=pixels.to(core.device, _type(core)))
    return torch.stack(list(found.pooler_output)), [places[id(picture)] for picture in pictures]


def _type(core: Any) -> Any:
    """Floating type of the activations: that of the embeddings, which are never quantized."""
    return core.get_input_embeddings().weight.dtype


def end_ids(core: Any) -> set[int]:
    """Ids that end an answer."""
    ends = core.generation_config.eos_token_id
    if ends is None:
        ends = core.config.text_config.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}


def head_length(core: Any, prompt: Sequence[int]) -> int:
    """How many ids of a prompt go up to the last image token; these are the same for all prompts of one template."""
    return len(prompt) - list(reversed(prompt)).index(core.config.image_token_id)


def heads(core: Any, features: Any, head: Sequence[int]) -> Layers:
    """Keys and values of `head` (the ids up to the last image token) for each picture of `features`, one a row."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([list(head)] * len(features), device=core.device)
        where = (ids == core.config.image_token_id).unsqueeze(-1)
        embedded = core.get_input_embeddings()(ids)
        cache = _cache([])
        states(core, embedded.masked_scatter(where, features.to(embedded)), torch.ones_like(ids), cache)
    return _layers(cache)


def after(core: Any, prefix: Layers, ids: Sequence[int]) -> Any:
    """Hidden states (tokens, hidden) of `ids` after the tokens of `prefix`, which is one row; keeps nothing."""
    import torch

    with torch.no_grad():
        embedded = core.get_input_embeddings()(torch.tensor([list(ids)], device=core.device))
        mask = torch.ones(1, length(prefix) + len(ids), dtype=torch.long, device=core.device)
        return states(core, embedded, mask, _cache(prefix))[0]


def states(core: Any, embedded: Any, mask: Any, cache: Any) -> Any:
    """Hidden states (rows, new, hidden) of the last layer after running `embedded` (rows, new, hidden) on the cache."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -embedded.shape[1] :]
    found = core.model.language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return found.last_hidden_state


def length(layers: Layers) -> int:
    """How many tokens the layers hold."""
    return int(layers[0][0].shape[2])


def cut(layers: Layers, start: int, stop: int, row: int | None = None) -> Layers:
    """The tokens `start` to `stop` of one row, or of all, without copying them."""
    rows = slice(None) if row is None else slice(row, row + 1)
    return [(keys[rows, :, start:stop], values[rows, :, start:stop]) for keys, values in layers]


def _cache(layers: Layers) -> Any:
    """A cache of transformers around the layers. Nothing is written into their tensors: it grows by copying."""
    from transformers import DynamicCache

    return DynamicCache(ddp_cache_data=layers) if layers else DynamicCache()


def _layers(cache: Any) -> Layers:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _padded(tensor: Any, columns: int) -> Any:
    """A cache tensor (or a mask) with `columns` more tokens of zeros in front."""
    import torch

    sides = (0, 0, columns, 0) if tensor.dim() == 4 else (columns, 0)
    return torch.nn.functional.pad(tensor, sides) if columns else tensor


def prefill(core: Any, rows: Sequence[Row]) -> tuple[Any, Layers, Any]:
    """Mask, keys and values, and last hidden states of rows that join; both parts of a row are padded on the left."""
    import torch

    held = [length(row.prefix) for row in rows]
    rests = [list(row.prompt[count:]) for row, count in zip(rows, held, strict=True)]
    most, longest = max(held), max(map(len, rests))
    padded = [[[_padded(part, most - length(row.prefix)) for part in pair] for pair in row.prefix] for row in rows]
    first = [tuple(torch.cat(parts) for parts in zip(*layer, strict=True)) for layer in zip(*padded, strict=True)]
    pad = core.config.text_config.pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(rest)) + rest for rest in rests], device=core.device)
    mask = [
        [0] * (most - count) + [1] * count + [0] * (longest - len(rest)) + [1] * len(rest)
        for count, rest in zip(held, rests, strict=True)
    ]
    cache, seen = _cache(first), torch.tensor(mask, device=core.device)
    hidden = states(core, core.get_input_embeddings()(ids), seen, cache)[:, -1]
    return seen, _layers(cache), hidden


class Batch:
    """Rows decoded together. `banned` ids are never chosen, ending ones excepted."""

    def __init__(self, core: Any, banned: Sequence[int]) -> None:
        """An empty batch on a LlavaForConditionalGeneration in eval mode."""
        import torch

        self._core, self._ends = core, end_ids(core)
        self._never = torch.tensor(sorted(set(banned) - self._ends), dtype=torch.long, device=core.device)
        self._active: list[int] = []  # which row lies in which line of the tensors below
        self._tokens: dict[int, int | None] = {}  # rows that go on, each with its token still to be run
        self._left: dict[int, int] = {}
        self._mask: Any = None
        self._cache: Any = None
        self._hidden: Any = None  # last hidden state of each line

    @property
    def rows(self) -> int:
        """How many rows are still being decoded."""
        return len(self._tokens)

    def join(self, rows: Sequence[Row]) -> None:
        """Compute what is left of the rows' prompts, as one padded batch, and decode them with the others from now."""
        import torch

        if not rows:
            return
        with torch.no_grad():
            self._catch_up()
            mask, layers, hidden = prefill(self._core, rows)
            if self._active:
                wide, old = mask.shape[1], self._mask.shape[1]
                more, less = max(0, old - wide), max(0, wide - old)
                pairs = zip(_layers(self._cache), layers, strict=True)
                layers = [
                    tuple(torch.cat([_padded(a, less), _padded(b, more)]) for a, b in zip(mine, theirs, strict=True))
                    for mine, theirs in pairs
                ]
                mask = torch.cat([_padded(self._mask, less), _padded(mask, more)])
                hidden = torch.cat([self._hidden, hidden])
        self._mask, self._cache, self._hidden = mask, _cache(layers), hidden
        for row in rows:
            self._active.append(row.index)
            self._tokens[row.index], self._left[row.index] = None, row.limit

    def step(self) -> list[Step]:
        """Choose one token for every row; a row that ends here leaves by itself."""
        import torch

        with torch.no_grad():
            self._catch_up()
            if not self._active:
                return []
            scores = self._core.lm_head(self._hidden).float()
            scores[:, self._never] = -torch.inf
            best = scores.softmax(-1).max(-1)
        steps = []
        for index, token, probability in zip(self._active, best.indices.tolist(), best.values.tolist(), strict=True):
            self._left[index] -= 1
            why = "stop" if token in self._ends else "length" if self._left[index] <= 0 else ""
            steps.append(Step(index, token, probability, why))
            self._tokens[index] = token
            if why:
                del self._tokens[index]
        return steps

    def leave(self, index: int) -> None:
        """Stop decoding a row; a row that has ended or never joined is no error."""
        self._tokens.pop(index, None)

    def close(self) -> None:
        """Free what the rows hold."""
        self._tokens = {}
        self._select([])

    def layers(self, index: int) -> Layers:
        """A copy of the keys and values of a row (not of its last token); ask before the next step."""
        place = self._active.index(index)
        real = self._mask[place].bool()
        return [(k[place : place + 1, :, real], v[place : place + 1, :, real]) for k, v in _layers(self._cache)]

    def _catch_up(self) -> None:
        """Drop the rows that ended and run the tokens that were chosen but not run yet."""
        import torch

        keep = [place for place, index in enumerate(self._active) if index in self._tokens]
        if len(keep) < len(self._active):
            self._select(keep)
        waiting = [self._tokens[index] for index in self._active]
        if not waiting or waiting[0] is None:  # empty, or nothing chosen since they joined
            return
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(waiting), 1)], 1)
        embedded = self._core.get_input_embeddings()(torch.tensor(waiting, device=self._core.device).unsqueeze(1))
        self._hidden = states(self._core, embedded, self._mask, self._cache)[:, -1]
        self._tokens = dict.fromkeys(self._tokens)

    def _select(self, keep: list[int]) -> None:
        """Keep these lines and cut off the columns in front that none of them uses."""
        import torch

        self._active = [self._active[place] for place in keep]
        self._left = {index: self._left[index] for index in self._active}
        if not keep:
            self._mask = self._cache = self._hidden = None
            return
        places = torch.tensor(keep, device=self._core.device)
        self._mask, self._hidden = self._mask[places], self._hidden[places]
        start = int(self._mask.any(0).int().argmax())
        kept = [(keys[places][:, :, start:], values[places][:, :, start:]) for keys, values in _layers(self._cache)]
        self._mask, self._cache = self._mask[:, start:], _cache(kept)
