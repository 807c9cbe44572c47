"""Pseudo-labels: teachers answer, about each picture, questions that were asked of other pictures of the same kind.

Lee 2013 (pseudo-labels); Xie et al. 2020, arXiv:1911.04252 (noisy student). The teachers see only training pictures and
training questions. The student then learns the answers, and the teachers' soft answers, on augmented pictures.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from model.collate import Encoded, encode_sample
from model.data import Sample
from model.prompts import IGNORE
from server.train_data import Bank, normalise

MOST_TOKENS = 16  # longer answers are dropped


def add(bank: Bank, teachers: Sequence[Any], processor: Any, per_picture: int, seed: int) -> int:
    """Append up to `per_picture` answered rows for each real picture of the bank; returns how many were added."""
    asked = questions(bank, per_picture, np.random.default_rng([seed, 77]))
    added = 0
    for number, teacher in enumerate(teachers):
        mine = asked[number :: len(teachers)]
        for start in range(0, len(mine), 256):
            part = mine[start : start + 256]
            for (image, sample), answer in zip(part, _answers(teacher, bank, part, processor), strict=True):
                if answer:
                    row = replace(sample, answer=answer)
                    bank.samples.append(row)
                    bank.encoded.append(encode_sample(row, processor.tokenizer, bank.prefix - 1, image))
                    bank.image_of.append(image)
                    added += 1
    return added


def questions(bank: Bank, per_picture: int, generator: Any) -> list[tuple[int, Sample]]:
    """(picture, unanswered row) pairs: questions asked of other pictures with the same source, location and modality.

    Mirrored pictures get questions of mirrored pictures, in which left and right are exchanged.
    """
    own: dict[int, list[Sample]] = defaultdict(list)
    kinds: dict[tuple[str, ...], dict[str, Sample]] = defaultdict(dict)
    for sample, image in zip(bank.samples, bank.image_of, strict=True):
        if sample.source != "phantoms":
            own[image].append(sample)
            kinds[_kind(sample)][sample.question] = sample
    chosen = []
    for image, rows in own.items():
        known = {row.question for row in rows}
        others = [row for text, row in kinds[_kind(rows[0])].items() if text not in known]
        for pick in generator.permutation(len(others))[:per_picture]:
            asked = replace(rows[0], id=f"{rows[0].id}-pseudo-{pick}", question=others[pick].question, answer="")
            chosen.append((image, replace(asked, answer_type=others[pick].answer_type, source="pseudo")))
    return chosen


def _kind(sample: Sample) -> tuple[str, ...]:
    mirror = "mirrored" if sample.id.endswith("-mirrored") else ""
    return sample.source, sample.meta.get("location", ""), sample.meta.get("modality", ""), mirror


@torch.no_grad()
def _answers(teacher: Any, bank: Bank, asked: Sequence[tuple[int, Sample]], processor: Any) -> list[str]:
    """Greedy answers; an empty text where the teacher did not come to an end."""
    tokenizer, device = processor.tokenizer, bank.pictures.device
    prompts = [_prompt(encode_sample(sample, tokenizer, bank.prefix - 1)) for _, sample in asked]
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), bank.pad_id)
    for line, prompt in enumerate(prompts):
        ids[line, length - len(prompt) :] = torch.tensor(prompt)
    index = torch.tensor([image for image, _ in asked], device=device)
    ids = ids.to(device)
    out = teacher.generate(
        input_ids=ids,
        attention_mask=(ids != bank.pad_id).long(),
        pixel_values=normalise(bank.pictures[index].float() / 255, processor),
        max_new_tokens=MOST_TOKENS,
        do_sample=False,
        pad_token_id=bank.pad_id,
    )[:, length:]
    end = tokenizer.eos_token_id
    return [tokenizer.decode(line, skip_special_tokens=True).strip() if end in line else "" for line in out.tolist()]


def _prompt(encoded: Encoded) -> list[int]:
    return [token for token, label in zip(encoded.ids, encoded.labels, strict=True) if label == IGNORE]
