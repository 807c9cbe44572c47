"""QLoRA on one clinic's samples: the 4-bit base stays frozen, only the asked-for factors of the adapter move.

`train` is the same code for a federated round (one factor), for a clinic alone and for pooled data (both factors).
Features of the tower are computed once when no target layer lies in it. Not here: what a clinic allows
(`client.limits`), the steps (`client.steps`), noise and clipping for each patient (`client.privacy`).
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client import memory
from client.batches import Batches
from client.courtesy import Courtesy, TimeOver, between_layers
from client.privacy import Noise, PrivateGradient
from client.steps import Gradient, TrainingFailed, run
from model import adapters
from model.data import Sample

__all__ = ["Options", "Prepared", "Trained", "TrainingFailed", "prepare", "train"]

Prepared = tuple[Any, Batches]  # the model with an adapter's layers, and the samples as it wants them


@dataclass(frozen=True)
class Trained:
    """What training gave: the whole `state` (arrays of a frozen factor are the very same) and how it went.

    `at_once` is the number of questions computed together, less than a batch where memory ran out; `cases` the number
    of patients that were trained on, 0 with noise, where it must not be known.
    """

    state: adapters.State
    loss_before: float
    loss_after: float
    losses: tuple[float, ...]
    steps: int
    examples: int
    seconds: float
    peak_rss_mib: float
    waited: float = 0.0
    at_once: int | None = None
    cases: int = 0


@dataclass(frozen=True)
class Options:
    """How `train` goes about it. `mu` is FedProx's proximal term; with `noise` every step is one of DP-SGD.

    The factors B learn at `lr_ratio` times the rate of the factors A (LoRA+, arXiv:2402.12354).
    """

    lr: float = 2e-3
    lr_ratio: float = 1.0
    batch: int = 16  # samples in a step
    alpha: float = 16.0
    seed: int = 0  # decides order and result, but for the noise
    bits: int = 4
    mu: float = 0.0
    noise: Noise | None = None
    seconds: float | None = None  # training ends early after them
    threads: int | None = None
    most_mib: int = 0  # memory that this process may take; 0: all there is
    courtesy: Courtesy | None = None  # says when to stand still
    progress: Callable[[int, int, float], None] | None = None  # called with (step, steps, loss) after each step


def train(
    samples: Sequence[Sample],
    base: Path,
    adapter_state: adapters.State,
    factors: Sequence[str] = ("A", "B"),
    steps: int = 60,
    *,
    prepared: Prepared | None = None,
    **options: Any,
) -> Trained:
    """Train `factors` of `adapter_state` on `samples` with the base model in `base`, `steps` optimizer steps.

    `prepared` saves the seconds of `prepare` where the same samples are trained on again, with its batch, alpha, bits
    and courtesy; `options` are the fields of `Options`. Raises TrainingFailed, MemoryShort, TimeOver, DataError,
    AdapterRejected.
    """
    import torch

    how, start = Options(**options), time.monotonic()
    if not samples:
        raise TrainingFailed("There are no samples to train on; correct and consent some cases at the kiosk first.")
    if how.threads:
        torch.set_num_threads(how.threads)
    torch.manual_seed(how.seed)
    deadline = None if how.seconds is None else start + how.seconds
    if how.courtesy:
        how.courtesy.deadline = deadline
    with memory.capped(how.most_mib):
        _wait(how)()
        model, batches = prepared or prepare(samples, base, adapter_state, how, deadline)
        _fill(model, adapter_state, factors)
        batches.restart(how.seed)
        before, losses, after, most = _learn(model, batches, steps, how, deadline)
    if not math.isfinite(after):
        raise TrainingFailed("The loss is no longer a number; use a smaller learning rate.")
    state, took = _state(model, adapter_state, factors), time.monotonic() - start
    waited, count = how.courtesy.waited if how.courtesy else 0.0, len(samples)
    cases = len(batches.touched)
    return Trained(state, before, after, tuple(losses), len(losses), count, took, _peak_mib(), waited, most, cases)


def _learn(
    model: Any, batches: Batches, steps: int, how: Options, deadline: float | None
) -> tuple[float, list[float], float, int | None]:
    """The optimizer's steps: loss before, of each step and after, and how many questions were computed at once."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    gradient = Gradient(batches, [p for p in model.parameters() if p.requires_grad])
    private = PrivateGradient(gradient, batches.patients(), how.noise) if how.noise else gradient
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=how.lr, loraplus_lr_ratio=how.lr_ratio, weight_decay=0.0, foreach=True
    )
    before = batches.probe()
    losses = run(private, optimizer, steps, how.mu, deadline, _wait(how), how.progress)
    try:
        if how.courtesy and how.courtesy.over:
            raise TimeOver("the time for training ran out")
        after = batches.probe()
    except TimeOver:  # what was learnt in time still counts
        if not losses:
            raise
        after = losses[-1]
    return before, losses, after, gradient.most


def _wait(how: Options) -> Callable[[], None]:
    """What to do before each step: stand still while the kiosk answers, and see that memory is within its bounds."""

    def wait() -> None:
        if how.courtesy:
            how.courtesy.pause()
        memory.check(how.most_mib)

    return wait


def prepare(
    samples: Sequence[Sample], base: Path, state: adapters.State, how: Options, deadline: float | None = None
) -> Prepared:
    """The model with layers for an adapter like `state`, and the samples as it wants them. Raises as `train` does."""

    def before() -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeOver("the time was over before the pictures were looked at")

    model, loaded = _attach(base, how.bits, state, how.alpha)
    _sees_features(model.base_model.model)
    if how.courtesy:
        between_layers(model, how.courtesy.pause)
    modules = [adapters.module(name) for name in state]
    return model, Batches(samples, model, loaded, modules, how.batch, how.seed, before)


def _sees_features(core: Any) -> None:
    """Raise TrainingFailed where transformers would silently ignore a picture's features."""
    if "mm_encoder_outputs" not in inspect.signature(type(core).forward).parameters:
        raise TrainingFailed(
            "This transformers would train without looking at the pictures; run pip install 'transformers>=5.23'."
        )


def _attach(base: Path, bits: int, state: adapters.State, alpha: float) -> tuple[Any, Any]:
    """The base model with PEFT layers for an adapter like `state`."""
    from peft import LoraConfig, get_peft_model

    from model.llava import load

    loaded = load(base, bits, train=True)
    rank = adapters.spec_of(state, alpha, loaded.base_sha256).rank
    modules = sorted({adapters.module(name) for name in state})
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=modules)
    model = get_peft_model(loaded.model, config)
    model.requires_grad_(False)
    _fill(model, state, ())  # an adapter that does not fit is refused before the pictures take their time
    _compute_in_bfloat16(model, loaded)
    return model.train(), loaded


def _fill(model: Any, state: adapters.State, factors: Sequence[str]) -> None:
    """Put the adapter's arrays into the PEFT layers; only `factors` take gradients. Raises AdapterRejected."""
    found = dict(_factors(model))
    if set(found) != set(state):
        odd = sorted(set(found) ^ set(state))[0]
        raise adapters.AdapterRejected(f"The adapter is not made for this base model: {odd} has no counterpart.")
    for name, parameter in found.items():
        if tuple(parameter.shape) != state[name].shape:
            raise adapters.AdapterRejected(f"{name} has shape {state[name].shape}, the model {tuple(parameter.shape)}.")
        parameter.data = _tensor(state[name]).to(parameter.device)
        parameter.requires_grad_(adapters.factor(name) in factors)
        parameter.grad = None


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


def _peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)
