"""The gradient of a step, in parts that fit into memory, and the optimizer's steps around it.

Where memory runs out the parts are halved, down to a single question, and the step is done again: a batch stays what it
was, and so does its gradient. Not here: which samples come (`client.batches`), and noise (`client.privacy`).
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from client import memory
from client.batches import Batches, Group
from client.courtesy import TimeOver

WARMUP = 24  # steps over which the learning rate rises: Adam's moments begin anew in every round, as noise
WARMUP_MOST, WARMUP_LEAST = 0.4, 0.05  # shares of all steps that this may be, in short and in long training
FLOOR = 0.1  # share of the learning rate that is left at the last step
CLIP = 1.0  # largest gradient norm of one step; a single odd sample must not throw the factors off


class TrainingFailed(RuntimeError):
    """Training cannot start or did not end well; the message says why and what to do."""


class Gradient:
    """Fills `grad` of the trained parameters. `most` is the number of questions computed at once, None for all."""

    def __init__(self, batches: Batches, parameters: Sequence[Any]) -> None:
        self.batches, self.parameters = batches, list(parameters)
        self.most: int | None = None

    def step(self) -> float:
        """Gradient of the next batch; returns its loss."""
        return self.of(self.batches.next_groups())

    def of(self, groups: Sequence[Group]) -> float:
        """Gradient of the mean loss over the answers' tokens of these groups; returns that loss."""
        while True:
            try:
                return self._attempt(groups)
            except (MemoryError, RuntimeError) as error:
                if not memory.ran_out(error):
                    raise
            self.clear()  # outside the handler: its traceback would keep the failed attempt's tensors
            memory.free()
            self._halve(sum(map(len, groups)))

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def _attempt(self, groups: Sequence[Group]) -> float:
        parts, total = split(groups, self.most), self.batches.answer_tokens(groups)
        value = 0.0
        for part in parts:
            loss = self.batches.loss(part)
            if len(parts) > 1:
                loss = loss * (self.batches.answer_tokens(part) / max(1, total))
            loss.backward()
            value += float(loss.detach())
        return value

    def _halve(self, questions: int) -> None:
        now = min(questions, self.most or questions)
        if now <= 1:
            raise TrainingFailed(
                "There is not enough memory for a single question; allow more (max_memory_mib in afya.toml), end other "
                "programs, or take part with a smaller base model."
            )
        self.most = (now + 1) // 2
        print(f"Memory ran out: {self.most} questions at once from now on.", flush=True)


def split(groups: Sequence[Group], most: int | None) -> list[list[Group]]:
    """Parts of at most `most` questions, in order; groups that are larger are cut. One part for None."""
    if most is None:
        return [list(groups)]
    parts: list[list[Group]] = [[]]
    for group in groups:
        for first in range(0, len(group), most):
            piece = group[first : first + most]
            if sum(map(len, parts[-1])) + len(piece) > most:
                parts.append([])
            parts[-1].append(piece)
    return [part for part in parts if part]


def run(
    gradient: Any,
    optimizer: Any,
    steps: int,
    mu: float,
    deadline: float | None,
    before: Callable[[], None],
    progress: Callable[[int, int, float], None] | None,
) -> list[float]:
    """Steps of `optimizer` on `gradient.parameters`; returns the loss of each. `before` is called before each step.

    `mu` pulls towards the values at the start (FedProx, arXiv:1812.06127). Ends early at `deadline` (monotonic clock).
    """
    import torch

    parameters = gradient.parameters
    start = [parameter.detach().clone() for parameter in parameters] if mu else []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    losses: list[float] = []
    for step in range(steps):
        try:
            before()
            losses.append(gradient.step())
        except TimeOver:
            break
        for parameter, origin in zip(parameters, start, strict=False):
            parameter.grad.add_(parameter.detach() - origin, alpha=mu)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(losses[-1]):
            raise TrainingFailed(f"The loss is no longer a number at step {step + 1}; use a smaller learning rate.")
        if progress:
            progress(step + 1, steps, losses[-1])
        if deadline is not None and time.monotonic() > deadline:
            break
    return losses


def rate(step: int, steps: int) -> float:
    """Share of the learning rate at `step`: linear warm-up, then a cosine down to `FLOOR`."""
    warm = max(1, min(WARMUP, round(steps * WARMUP_MOST)), round(steps * WARMUP_LEAST))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
