"""Samples as the trainer wants them: features of the tower computed once, questions on one picture in one sequence.

Up to `PACK` questions about a picture share its positions (`model.packing`): the loss is the same, the work a third.
Not here: the optimizer (`client.trainer`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from client import memory
from model.data import Sample, load_rgb
from model.packing import shared_prefix
from model.prompts import IGNORE

PACK = 4  # questions in one sequence: beyond it the questions, not the picture, take most of the positions
PROBE = 32  # samples on which the loss before and after is measured: enough to see a change, a second on two cores
_AT_ONCE = 16  # pictures that go through the tower together

Group = list[int]


class Batches:
    """Encoded samples and their pictures' features; gives the loss of the next batch.

    `modules` are the layers with an adapter: when none lies in the tower, its output is computed once for each picture;
    when none lies in the projector either, the projector's too. Rows come in an order that depends on `seed` only.
    `before` is called before each part of that output, and may raise to stop it.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        model: Any,
        loaded: Any,
        modules: Sequence[str],
        batch: int,
        seed: int,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        from model.collate import encode_sample

        self.before = before
        self.loaded, self.core, self.processor = loaded, model.base_model.model, loaded.processor
        self.pictures, self.image_of = pictures_of(samples)
        tower_frozen = not any(".vision_tower." in name for name in modules)
        self.projector_frozen = tower_frozen and not any(".multi_modal_projector." in name for name in modules)
        self.features = self._features() if tower_frozen else None
        tokens, tokenizer, template = self._image_tokens(), self.processor.tokenizer, loaded.template
        self.encoded = [encode_sample(sample, tokenizer, tokens, template=template) for sample in samples]
        self.prefix = shared_prefix(self.encoded, self.core.config.image_token_id)
        self.learnt = [sum(label != IGNORE for label in item.labels) for item in self.encoded]
        self.names = [sample.group for sample in samples]
        self.batch = min(batch, len(self.encoded))
        self.restart(seed)
        self.probe_groups = list(self._some(np.random.default_rng(0)))

    def restart(self, seed: int) -> None:
        """Begin the rows' order anew."""
        self.generator, self.order = np.random.default_rng(seed), list[Group]()
        self.touched: set[str] = set()  # patients of the batches since then

    def next_groups(self) -> list[Group]:
        """Rows of the next batch; every sample comes once before any comes again."""
        groups: list[Group] = []
        while sum(map(len, groups)) < self.batch:
            if not self.order:
                self.order = self._groups(self.generator)
            groups.append(self.order.pop())
        self.touched |= {self.names[row] for group in groups for row in group}
        return groups

    def patients(self) -> list[list[Group]]:
        """The groups of each patient (`Sample.group`), in the order of the patients' names."""
        images: dict[str, dict[int, Group]] = {}
        for row, name in enumerate(self.names):
            images.setdefault(name, {}).setdefault(self.image_of[row], []).append(row)
        return [
            [rows[first : first + PACK] for rows in images[name].values() for first in range(0, len(rows), PACK)]
            for name in sorted(images)
        ]

    def answer_tokens(self, groups: Sequence[Group]) -> int:
        """Number of tokens that the loss of these groups is the mean of."""
        return sum(self.learnt[row] for group in groups for row in group)

    def _some(self, generator: np.random.Generator) -> Iterator[Group]:
        """Groups with about `PROBE` samples together."""
        count = 0
        for group in self._groups(generator):
            yield group
            count += len(group)
            if count >= PROBE:
                return

    def _groups(self, generator: np.random.Generator) -> list[Group]:
        """All samples in random order, at most `PACK` questions on one picture together."""
        from model.packing import grouped

        return grouped(range(len(self.encoded)), self.image_of, PACK, generator)

    def probe(self) -> float:
        """Loss over a fixed handful of samples, without gradients; picture by picture where memory runs out."""
        import torch

        with torch.no_grad():
            try:
                return float(self.loss(self.probe_groups))
            except (MemoryError, RuntimeError) as error:
                if not memory.ran_out(error):
                    raise
            memory.free()
            total = max(1, self.answer_tokens(self.probe_groups))
            shares = ((self.answer_tokens([group]) / total, group) for group in self.probe_groups)
            return sum(share * float(self.loss([group])) for share, group in shares if share)

    def loss(self, groups: Sequence[Group]) -> Any:
        """Cross-entropy over the answers' tokens of these groups; logits of picture positions are never computed."""
        from model.packing import pack

        packed = pack(self.encoded, groups, self.prefix, self.processor.tokenizer.pad_token_id)
        return self.cross_entropy(packed, self._vision([self.image_of[group[0]] for group in groups]))

    def cross_entropy(self, packed: Sequence[Any], vision: Mapping[str, Any], reduction: str = "mean") -> Any:
        """Cross-entropy of `packed` sequences (`model.packing.pack`); `vision` is what stands for their pictures.

        A scalar, or with `reduction` "none" a tensor (sequences * (text positions - 1),), 0 where nothing is learnt.
        """
        import torch

        from model.packing import visible

        ids, labels, segments, positions = (tensor.to(self.loaded.device) for tensor in packed)
        text = ids.shape[1] - self.prefix
        output = self.core(
            input_ids=ids, attention_mask=visible(segments), position_ids=positions, logits_to_keep=text, **vision
        )
        logits, wanted = output.logits[:, :-1].float().flatten(0, 1), labels[:, 1 - text :].flatten()
        return torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction=reduction)

    def _vision(self, images: Sequence[int]) -> dict[str, Any]:
        """What the model gets for these pictures: pixels, or their features where those are known already."""
        if self.features is None:
            return {"pixel_values": self._pixels(images)}
        return self.seen(self.features[list(images)])

    def seen(self, features: Any) -> dict[str, Any]:
        """What the model gets in place of pixels: `features` (pictures, positions, width), through the projector."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

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
        first, at_once = 0, _AT_ONCE
        try:
            with torch.no_grad():
                while first < len(self.pictures):
                    self.before()
                    images, whole = range(first, min(first + at_once, len(self.pictures))), len(seen)
                    if self._seen_by_tower(images):
                        first += at_once
                        continue
                    del seen[whole:]
                    memory.free()
                    if at_once > 1:
                        at_once //= 2
                    else:
                        raise MemoryError("out of memory: not even one picture goes through the vision tower")
        finally:
            hook.remove()
        return torch.cat(seen)

    def _seen_by_tower(self, images: Sequence[int]) -> bool:
        """Send pictures through tower and projector; False when memory ran out over it."""
        try:
            self.core.get_image_features(pixel_values=self._pixels(images))
        except (MemoryError, RuntimeError) as error:
            if not memory.ran_out(error):
                raise
            return False
        return True

    def _image_tokens(self) -> int:
        import torch

        if self.features is not None:
            return int(self.features.shape[1])
        with torch.no_grad():
            return len(self.core.get_image_features(pixel_values=self._pixels([0])).pooler_output[0])


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
