"""Greedy decoding of a padded batch with a key-value cache: the loop under `model.backends`.

A picture asked about several times is encoded once. Rows that are finished leave the batch. No sampling and no beams:
the same question gives the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Step:
    """One chosen token of row `index`: its id, its probability, and why the row ended ("", "stop" or "length")."""

    index: int
    token: int
    probability: float
    finished: str


@dataclass
class Rows:
    """The rows still being decoded: which they are, their mask (rows, length), cache, and the last hidden states."""

    active: list[int]
    mask: Any
    cache: Any
    hidden: Any
    taken: list[int] = field(default_factory=list)


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


def greedy(
    core: Any,
    features: Any,
    owners: Sequence[int],
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    banned: Sequence[int],
) -> Iterator[list[Step]]:
    """Decode all prompts together, yielding after each position the tokens chosen for the rows still active.

    `features[owners[i]]` replaces the image tokens of `prompts[i]`; row i ends with its end-of-sequence token or after
    `limits[i]` tokens. `banned` ids are never chosen, ending ones excepted. Between two positions the caller is in its
    own gradient mode.
    """
    rows = _prefill(core, features, owners, prompts)
    ends = _ends(core)
    never = sorted(set(banned) - ends)
    while True:
        tokens, probabilities = _choose(core, rows.hidden, never)
        steps, keep = [], []
        for place, index in enumerate(rows.active):
            rows.taken[index] += 1
            why = "stop" if tokens[place] in ends else "length" if rows.taken[index] >= limits[index] else ""
            steps.append(Step(index, tokens[place], probabilities[place], why))
            if not why:
                keep.append(place)
        yield steps
        if not keep:
            return
        _advance(core, rows, keep, [tokens[place] for place in keep])


def _ends(core: Any) -> set[int]:
    """Ids that end an answer."""
    ends = core.generation_config.eos_token_id
    if ends is None:
        ends = core.config.text_config.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}


def _prefill(core: Any, features: Any, owners: Sequence[int], prompts: Sequence[Sequence[int]]) -> Rows:
    """Run the decoder over the prompts once: the part up to the picture once for each picture, then each row's rest.

    The rests are padded on the left, so the last position of every row is its last token. Between picture and rest
    the mask has a gap, the positions have none.
    """
    import torch
    from transformers import DynamicCache

    head = _shared_head(core, prompts)
    rests = [list(prompt[len(head) :]) for prompt in prompts]
    length = max(map(len, rests))
    pad = core.config.text_config.pad_token_id or 0
    with torch.no_grad():
        table, device = core.get_input_embeddings(), core.device
        places = torch.tensor(list(owners), device=device)
        ids = torch.tensor([head] * len(features), device=device)
        where = (ids == core.config.image_token_id).unsqueeze(-1)
        embedded = table(ids)
        cache = DynamicCache(config=core.config.text_config)
        _decoder(core, embedded.masked_scatter(where, features.to(embedded)), torch.ones_like(ids), cache)
        cache.batch_select_indices(places)
        ids = torch.tensor([[pad] * (length - len(rest)) + rest for rest in rests], device=device)
        mask = torch.tensor([[0] * (length - len(rest)) + [1] * len(rest) for rest in rests], device=device)
        mask = torch.cat([mask.new_ones(len(rests), len(head)), mask], 1)
        hidden = _decoder(core, table(ids), mask, cache)
    return Rows(list(range(len(prompts))), mask, cache, hidden, [0] * len(prompts))


def _shared_head(core: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The ids up to the last image token, which are the same for all prompts of one template."""
    heads = {tuple(p[: len(p) - list(reversed(p)).index(core.config.image_token_id)]) for p in prompts}
    if len(heads) != 1:
        raise ValueError("prompts of one batch must begin alike up to the picture")
    return list(heads.pop())


def _decoder(core: Any, embedded: Any, mask: Any, cache: Any) -> Any:
    """Hidden state (rows, hidden) of the last position after running `embedded` (rows, new, hidden) on the cache."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -embedded.shape[1] :]
    found = core.model.language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return found.last_hidden_state[:, -1]


def _choose(core: Any, hidden: Any, banned: list[int]) -> tuple[list[int], list[float]]:
    """The likeliest allowed token of each row and its probability among the allowed ones."""
    import torch

    with torch.no_grad():
        scores = core.lm_head(hidden).float()
        scores[:, banned] = -torch.inf
        best = scores.softmax(-1).max(-1)
    return best.indices.tolist(), best.values.tolist()


def _advance(core: Any, rows: Rows, keep: list[int], tokens: list[int]) -> None:
    """Drop the finished rows, append one token to the others and run the decoder on it."""
    import torch

    with torch.no_grad():
        if len(keep) < len(rows.active):
            places = torch.tensor(keep, device=core.device)
            rows.cache.batch_select_indices(places)
            rows.mask = rows.mask[places]
            rows.active = [rows.active[place] for place in keep]
        rows.mask = torch.cat([rows.mask, rows.mask.new_ones(len(keep), 1)], 1)
        embedded = core.get_input_embeddings()(torch.tensor(tokens, device=core.device).unsqueeze(1))
        rows.hidden = _decoder(core, embedded, rows.mask, rows.cache)
