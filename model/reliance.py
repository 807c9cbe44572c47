"""Does an answer depend on the picture? One extra pass with the picture blanked tells.

`nats` is the drop of the answer's log-probability when the picture is replaced by uniform grey: log p(answer | picture)
- log p(answer | grey), natural logarithm, answer and end mark together. An answer that the model would give without
looking keeps its probability. The idea is the blank-image baseline of visual question answering (Goyal et al. 2017,
arXiv:1612.00837); the two thresholds are ours, measured on SLAKE (NOTES.md). Not covered: whether the picture was read
rightly, and answers that depend on something in the picture that is not the finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GREY = 127
RELIANT, NOT_RELIANT = 0.69, 0.1  # nats: the picture at least doubles the probability; it changes it by under a tenth


@dataclass(frozen=True)
class Reliance:
    """`mark` is "image-reliant", "not image-reliant" or "unsure"; `nats` is the number behind it."""

    mark: str
    nats: float


def judge(nats: float) -> Reliance:
    """The mark of a drop in nats; a probability that rises without the picture is no reliance either."""
    if nats >= RELIANT:
        return Reliance("image-reliant", nats)
    return Reliance("not image-reliant" if nats <= NOT_RELIANT else "unsure", nats)


def flag(mark: str | None) -> bool | None:
    """The mark as `Answer.image_reliant`: True, False, or None for "unsure" and for no mark."""
    return {"image-reliant": True, "not image-reliant": False}.get(mark or "")


def blank(picture: np.ndarray) -> np.ndarray:
    """Uniform grey of the same shape as `picture`, uint8 (H, W, 3)."""
    return np.full_like(picture, GREY)


def log_probabilities(
    core: Any,
    processor: Any,
    pictures: Sequence[np.ndarray],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    banned: Sequence[int],
) -> list[float]:
    """log p(answer | picture, prompt) of each row in one forward pass, without sampling.

    `prompts` hold the picture's tokens, `answers` the chosen ids with the end mark; `banned` ids have no probability,
    ending ones excepted, as in `model.decode.Batch`. Rows may differ in length.
    """
    import torch

    from model import decode

    features, owners = decode.encode_pictures(core, processor, pictures)
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    pad = core.config.text_config.pad_token_id or 0
    ids = torch.full((len(prompts), length), pad, device=core.device)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        both = torch.tensor([*prompt, *answer], device=core.device)
        ids[row, : len(both)], mask[row, : len(both)] = both, 1
    with torch.no_grad():
        embedded = core.get_input_embeddings()(ids)
        where = (ids == core.config.image_token_id).unsqueeze(-1)
        own = features[torch.tensor(owners, device=core.device)]
        hidden = core.model.language_model(
            inputs_embeds=embedded.masked_scatter(where, own.to(embedded)), attention_mask=mask, use_cache=False
        ).last_hidden_state
        return [
            _one(core, hidden[row, len(prompt) - 1 : len(prompt) + len(answer) - 1], answer, banned)
            for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]


def continued(core: Any, prefix: Any, prompt: Sequence[int], answer: Sequence[int], banned: Sequence[int]) -> float:
    """log p(answer | prompt), where `prefix` holds keys and values of the first tokens of the prompt, never of all."""
    from model import decode

    rest = [*prompt[decode.length(prefix) :], *answer[:-1]]
    return _one(core, decode.after(core, prefix, rest)[-len(answer) :], answer, banned)


def _one(core: Any, hidden: Any, answer: Sequence[int], banned: Sequence[int]) -> float:
    import torch

    from model import decode

    with torch.no_grad():
        scores = core.lm_head(hidden).float()
        scores[:, sorted(set(banned) - decode.end_ids(core))] = -torch.inf
        chosen = scores.log_softmax(-1).gather(1, torch.tensor(list(answer), device=scores.device).unsqueeze(1))
    return float(chosen.sum())
