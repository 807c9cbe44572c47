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

from client.batches import Batches
from model import adapters
from model.data import Sample

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
    batches = Batches(samples, model, loaded, [adapters.module(name) for name in adapter_state], batch, seed)
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
    _compute_in_bfloat16(model, loaded)
    return model.train(), loaded


def _compute_in_bfloat16(model: Any, loaded: Any) -> None:
    """Let the 4-bit layers multiply in bfloat16 where the processor has instructions for it: a quarter less time."""
    import torch

    if loaded.bits != 4 or loaded.device != "cpu" or not torch.cpu._is_avx512_bf16_supported():
        return
    for layer in model.modules():
        if hasattr(layer, "compute_type_is_set"):
            layer.compute_dtype, layer.compute_type_is_set = torch.bfloat16, True


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


def _loop(
    model: Any,
    batches: Batches,
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
