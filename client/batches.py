"""Samples as the trainer wants them: features of the tower computed once, questions on one picture in one sequence.

A picture takes most of a sequence's positions, so up to `PACK` questions about it share them: each question sees the
picture and itself, never another question, at the positions it would have alone. The loss is the same, the work less.
Not here: the optimizer (`client.trainer`).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from model.data import Sample, load_rgb

PACK = 4  # questions in one sequence: beyond it the questions, not the picture, take most of the positions
PROBE = 32  # samples on which the loss before and after is measured: enough to see a change, a second on two cores
_AT_ONCE = 16  # pictures that go through the tower together

Group = list[int]


class Batches:
    """Encoded samples and their pictures' features; gives the loss of the next batch.

    `modules` are the layers with an adapter: when none lies in the tower, its output is computed once for each picture;
    when none lies in the projector either, the projector's too. Rows come in an order that depends on `seed` only.
    """

    def __init__(
        self, samples: Sequence[Sample], model: Any, loaded: Any, modules: Sequence[str], batch: int, seed: int
    ) -> None:
        from model.collate import encode_sample

        self.loaded, self.core, self.processor = loaded, model.base_model.model, loaded.processor
        self.pictures, self.image_of = pictures_of(samples)
        tower_frozen = not any(".vision_tower." in name for name in modules)
        self.projector_frozen = tower_frozen and not any(".multi_modal_projector." in name for name in modules)
        self.features = self._features() if tower_frozen else None
        image_tokens = self._image_tokens()
        self.prefix = image_tokens + 1  # the start mark and the picture: the same for all questions on one picture
        tokenizer = self.processor.tokenizer
        self.encoded = [encode_sample(sample, tokenizer, image_tokens) for sample in samples]
        self.batch, self.generator = min(batch, len(self.encoded)), np.random.default_rng(seed)
        self.order: list[Group] = []
        rows = np.random.default_rng(0).permutation(len(self.encoded))[:PROBE]
        self.probe_groups = [[int(row)] for row in rows]

    def next_loss(self) -> Any:
        """Loss (scalar tensor) of the next batch; every sample comes once before any comes again."""
        groups: list[Group] = []
        while sum(map(len, groups)) < self.batch:
            if not self.order:
                self.order = list(self._groups())
            groups.append(self.order.pop())
        return self.loss(groups)

    def _groups(self) -> Iterator[Group]:
        """All samples in random order, at most `PACK` questions on one picture together."""
        by_image: dict[int, Group] = {}
        for row in self.generator.permutation(len(self.encoded)):
            by_image.setdefault(self.image_of[int(row)], []).append(int(row))
        groups = [rows[i : i + PACK] for rows in by_image.values() for i in range(0, len(rows), PACK)]
        yield from (groups[int(i)] for i in self.generator.permutation(len(groups)))

    def probe(self) -> float:
        """Mean loss over a fixed handful of samples, without gradients."""
        import torch

        with torch.no_grad():
            parts = [self.probe_groups[i : i + _AT_ONCE] for i in range(0, len(self.probe_groups), _AT_ONCE)]
            total = sum(float(self.loss(groups)) * len(groups) for groups in parts)
        return total / len(self.probe_groups)

    def loss(self, groups: Sequence[Group]) -> Any:
        """Cross-entropy over the answers' tokens of these groups; logits of picture positions are never computed."""
        import torch

        from model.prompts import IGNORE

        ids, labels, segments, positions = (t.to(self.loaded.device) for t in self._pack(groups))
        vision = self._vision([self.image_of[group[0]] for group in groups])
        text = ids.shape[1] - self.prefix
        output = self.core(
            input_ids=ids, attention_mask=_visible(segments), position_ids=positions, logits_to_keep=text, **vision
        )
        return torch.nn.functional.cross_entropy(
            output.logits[:, :-1].float().flatten(0, 1), labels[:, 1 - text :].flatten(), ignore_index=IGNORE
        )

    def _pack(self, groups: Sequence[Group]) -> tuple[Any, Any, Any, Any]:
        """Ids, labels, segments (0 picture, 1.. questions, -1 padding) and positions, each int64 (groups, length)."""
        import torch

        from model.prompts import IGNORE

        length = self.prefix + max(sum(len(self.encoded[r].ids) - self.prefix for r in group) for group in groups)
        ids = torch.full((len(groups), length), self.processor.tokenizer.pad_token_id)
        labels, segments = torch.full_like(ids, IGNORE), torch.full_like(ids, -1)
        positions = torch.zeros_like(ids)
        for line, group in enumerate(groups):
            ids[line, : self.prefix] = torch.tensor(self.encoded[group[0]].ids[: self.prefix])
            segments[line, : self.prefix] = 0
            positions[line, : self.prefix] = torch.arange(self.prefix)
            start = self.prefix
            for number, row in enumerate(group, 1):
                item = self.encoded[row]
                part = slice(start, start + len(item.ids) - self.prefix)
                ids[line, part] = torch.tensor(item.ids[self.prefix :])
                labels[line, part] = torch.tensor(item.labels[self.prefix :])
                segments[line, part] = number
                positions[line, part] = torch.arange(self.prefix, len(item.ids))
                start = part.stop
        return ids, labels, segments, positions

    def _vision(self, images: Sequence[int]) -> dict[str, Any]:
        """What the model gets for these pictures: pixels, or their features where those are known already."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        if self.features is None:
            return {"pixel_values": self._pixels(images)}
        features = self.features[list(images)]
        if not self.projector_frozen:
            features = self.core.model.multi_modal_projector(features)
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(features))}}

    def _pixels(self, images: Sequence[int]) -> Any:
        import torch

        from model.collate import pixel_values

        pixels = pixel_values([load_rgb(self.pictures[i]) for i in images], self.processor)
        return pixels.to(self.loaded.device, getattr(torch, self.loaded.dtype))

    def _features(self) -> Any:
        """Tensor (pictures, positions, width): what the projector gets for each picture, or gives when it is frozen."""
        import torch

        projector, seen = self.core.model.multi_modal_projector, []
        hook = projector.register_forward_hook(
            lambda _, given, made: seen.append(made if self.projector_frozen else given[0])
        )
        try:
            with torch.no_grad():
                for first in range(0, len(self.pictures), _AT_ONCE):
                    images = range(first, min(first + _AT_ONCE, len(self.pictures)))
                    self.core.get_image_features(pixel_values=self._pixels(images))
        finally:
            hook.remove()
        return torch.cat(seen)

    def _image_tokens(self) -> int:
        import torch

        if self.features is not None:
            return int(self.features.shape[1])
        with torch.no_grad():
            return len(self.core.get_image_features(pixel_values=self._pixels([0])).pooler_output[0])


def _visible(segments: Any) -> Any:
    """Bool (groups, 1, length, length): position i sees j if j is not later and is picture or of i's own question."""
    import torch

    length = segments.shape[1]
    order = torch.ones((length, length), dtype=torch.bool, device=segments.device).tril()
    mine, other = segments[:, :, None], segments[:, None, :]
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)  # padding must see something
    return ((order & ((other == 0) | (other == mine)) & (other >= 0)) | itself)[:, None]


def pictures_of(samples: Sequence[Sample]) -> tuple[list[Sample], list[int]]:
    """One sample for each distinct picture, and for each sample the number of its picture."""
    numbers: dict[object, int] = {}
    pictures: list[Sample] = []
    rows = []
    for sample in samples:
        key = id(sample.image) if isinstance(sample.image, np.ndarray) else str(sample.image)
        if key not in numbers:
            numbers[key] = len(pictures)
            pictures.append(sample)
        rows.append(numbers[key])
    return pictures, rows
