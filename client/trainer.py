"""QLoRA on one clinic's samples: the 4-bit base stays frozen, only the asked-for factors of the adapter move.

`train` is the same code for a federated round (one factor), for a clinic alone and for pooled data (both factors).
Features of the tower are computed once when no target layer lies in it. Not here: what a clinic allows
(`client.limits`), differential privacy, and backing off when memory runs out.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model import adapters
from model.data import Sample, load_rgb

PROBE = 32  # samples on which the loss before and after is measured: enough to see a change, a second on two cores
WARMUP = 0.05  # share of the steps over which the learning rate rises
FLOOR = 0.1  # share of the learning rate that is left at the last step
CLIP = 1.0  # largest gradient norm of one step; a single odd sample must not throw the factors off


class TrainingFailed(RuntimeError):
    """Training cannot start or did not end well; the message says why and what to do."""


@dataclass(frozen=True)
class Trained:
    """What training gave: the whole `state` (arrays of a frozen factor are the very same) and how it went."""

    state: adapters.State
    loss_before: float
    loss_after: float
    losses: tuple[float, ...]
    steps: int
    examples: int
    seconds: float
    peak_rss_mib: float


def train(
    samples: Sequence[Sample],
    base: Path,
    adapter_state: adapters.State,
    factors: Sequence[str] = ("A", "B"),
    steps: int = 60,
    *,
    lr: float = 2e-3,
    batch: int = 16,
    alpha: float = 16.0,
    seed: int = 0,
    bits: int = 4,
    seconds: float | None = None,
    threads: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Trained:
    """Train `factors` of `adapter_state` on `samples` with the base model in `base` at `bits` bits.

    `steps` optimizer steps of `batch` samples with AdamW; stops early after `seconds`. `progress(step, steps, loss)` is
    called after each step. Order and result depend on `seed` only. Raises TrainingFailed, DataError, AdapterRejected.
    """
    import torch

    start = time.monotonic()
    if not samples:
        raise TrainingFailed("There are no samples to train on; correct and consent some cases at the kiosk first.")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model, loaded = _attach(base, bits, adapter_state, alpha, factors)
    batches = _Batches(samples, model, loaded, [adapters.module(name) for name in adapter_state], batch, seed)
    before = batches.probe()
    losses = _loop(model, batches, steps, lr, start, seconds, progress)
    after = batches.probe()
    if not math.isfinite(after):
        raise TrainingFailed("The loss is no longer a number; use a smaller learning rate.")
    state = _state(model, adapter_state, factors)
    took = time.monotonic() - start
    return Trained(state, before, after, tuple(losses), len(losses), len(samples), took, _peak_mib())


def _attach(base: Path, bits: int, state: adapters.State, alpha: float, factors: Sequence[str]) -> tuple[Any, Any]:
    """The base model with the adapter's arrays in PEFT layers; only `factors` take gradients."""
    from peft import LoraConfig, get_peft_model

    from model.llava import load

    loaded = load(base, bits, train=True)
    rank = adapters.spec_of(state, alpha, loaded.base_sha256).rank
    modules = sorted({adapters.module(name) for name in state})
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=modules)
    model = get_peft_model(loaded.model, config)
    model.requires_grad_(False)
    found = dict(_factors(model))
    if set(found) != set(state):
        odd = sorted(set(found) ^ set(state))[0]
        raise adapters.AdapterRejected(f"The adapter is not made for this base model: {odd} has no counterpart.")
    for name, parameter in found.items():
        if tuple(parameter.shape) != state[name].shape:
            raise adapters.AdapterRejected(f"{name} has shape {state[name].shape}, the model {tuple(parameter.shape)}.")
        parameter.data = _tensor(state[name]).to(parameter.device)
        parameter.requires_grad_(adapters.factor(name) in factors)
    return model.train(), loaded


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.array(array, dtype=np.float32))


def _factors(model: Any) -> Iterator[tuple[str, Any]]:
    """LoRA parameters of a PEFT model under the names PEFT saves them by (without the adapter's name)."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            yield name.replace(".default.weight", ".weight"), parameter


def _state(model: Any, before: adapters.State, factors: Sequence[str]) -> adapters.State:
    """Arrays after training; those of frozen factors are the ones that came in."""
    found = dict(_factors(model))
    return {
        name: found[name].detach().cpu().numpy().copy() if adapters.factor(name) in factors else array
        for name, array in before.items()
    }


class _Batches:
    """Encoded samples and their pictures' features; gives the loss of any set of rows."""

    def __init__(
        self, samples: Sequence[Sample], model: Any, loaded: Any, modules: Sequence[str], batch: int, seed: int
    ) -> None:
        from model.collate import encode_sample

        self.model, self.loaded = model, loaded
        self.core = model.base_model.model
        self.processor = loaded.processor
        self.tower_frozen = not any(".vision_tower." in f".{name}" for name in modules)
        self.pictures, rows = _table(samples)
        self.features = self._tower_features() if self.tower_frozen else None
        self.image_tokens = self._image_tokens()
        tokenizer = self.processor.tokenizer
        self.encoded = [encode_sample(s, tokenizer, self.image_tokens, i) for s, i in zip(samples, rows, strict=True)]
        self.size, self.generator = min(batch, len(self.encoded)), np.random.default_rng(seed)
        self.order: list[int] = []
        probe = np.random.default_rng(0).permutation(len(self.encoded))[:PROBE]
        self.probe_rows = [int(row) for row in probe]

    def next_loss(self) -> Any:
        """Loss of the next batch; rows come in seeded random order, each once per pass."""
        while len(self.order) < self.size:
            self.order += [int(row) for row in self.generator.permutation(len(self.encoded))]
        rows, self.order = self.order[: self.size], self.order[self.size :]
        return self.loss(rows)

    def probe(self) -> float:
        """Mean loss over a fixed handful of samples, without gradients."""
        import torch

        with torch.no_grad():
            parts = [self.probe_rows[i : i + 16] for i in range(0, len(self.probe_rows), 16)]
            total = sum(float(self.loss(rows)) * len(rows) for rows in parts)
        return total / len(self.probe_rows)

    def loss(self, rows: Sequence[int]) -> Any:
        """Cross-entropy of the answers' tokens; logits of picture positions are never computed."""
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        from model.collate import pad
        from model.prompts import IGNORE

        items = [self.encoded[row] for row in rows]
        tensors = pad(items, self.processor.tokenizer.pad_token_id)
        tensors = {name: tensor.to(self.loaded.device) for name, tensor in tensors.items()}
        vision: dict[str, Any]
        if self.features is None:
            vision = {"pixel_values": self._pixels([item.image for item in items])}
        else:
            images = self._project(self.features[[item.image for item in items]])
            vision = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(images))}}
        text = tensors["input_ids"].shape[1] - self.image_tokens - 1
        output = self.core(
            input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"], logits_to_keep=text, **vision
        )
        labels = tensors["labels"][:, -text:]
        return torch.nn.functional.cross_entropy(
            output.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
        )

    def _pixels(self, images: Sequence[int]) -> Any:
        import torch

        from model.collate import pixel_values

        pixels = pixel_values([load_rgb(self.pictures[i]) for i in images], self.processor)
        return pixels.to(self.loaded.device, getattr(torch, self.loaded.dtype))

    def _project(self, features: Any) -> Any:
        return self.core.model.multi_modal_projector(features)

    def _tower_features(self) -> Any:
        """What the projector gets for every picture: tensor (pictures, positions, width), computed once."""
        import torch

        seen: list[Any] = []
        hook = self.core.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with torch.no_grad():
                for first in range(0, len(self.pictures), 16):
                    rows = range(first, min(first + 16, len(self.pictures)))
                    self.core.get_image_features(pixel_values=self._pixels(rows))
        finally:
            hook.remove()
        return torch.cat(seen)

    def _image_tokens(self) -> int:
        if self.features is not None:
            return int(self.features.shape[1])
        import torch

        with torch.no_grad():
            return len(self.core.get_image_features(pixel_values=self._pixels([0])).pooler_output[0])


def _table(samples: Sequence[Sample]) -> tuple[list[Sample], list[int]]:
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


def _loop(
    model: Any,
    batches: _Batches,
    steps: int,
    lr: float,
    start: float,
    seconds: float | None,
    progress: Callable[[int, int, float], None] | None,
) -> list[float]:
    """The optimizer steps; returns the loss of each."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    losses: list[float] = []
    for step in range(steps):
        loss = batches.next_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise TrainingFailed(f"The loss is no longer a number at step {step + 1}; use a smaller learning rate.")
        if progress:
            progress(step + 1, steps, losses[-1])
        if seconds is not None and time.monotonic() - start > seconds:
            break
    return losses


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at `step`: linear warm-up, then a cosine down to `FLOOR`."""
    warm = max(1, round(steps * WARMUP))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)
