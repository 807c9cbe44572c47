"""The trainings of many clinics in one process: their factors side by side in each pass of the one frozen base.

A step costs one pass however many they are; on a GPU, which a small model leaves idle, that is a fraction of the time.
Batches, schedule, optimizer and clipping are those of the clinics' trainer (`client.trainer`). Not here: which clinics
and what becomes of their factors (`slake_together`), and an adapter in the vision tower.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from client import steps as schedule
from client.batches import Batches
from model import adapters
from model.packing import pack
from model.prompts import IGNORE


class GroupedLinear(torch.nn.Module):
    """A frozen layer beside the factors of many clinics: A (clinics, rank, in), B (clinics, out, rank), scale s.

    The input's rows are the clinics' in turn, equally many each.
    """

    def __init__(self, base: Any, a: Any, b: Any, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x: Any) -> Any:
        """What the frozen layer gives, plus s B A x of the clinic whose row it is."""
        rows = x.reshape(len(self.a), -1, x.shape[-1]).to(self.a.dtype)
        update = torch.bmm(torch.bmm(rows, self.a.transpose(1, 2)), self.b.transpose(1, 2)) * self.scale
        found = self.base(x)
        return found + update.reshape(found.shape).to(found.dtype)


@dataclass(frozen=True)
class Job:
    """One clinic's training in a round: its own order of its samples, the factors it begins with, the order's seed."""

    batches: Batches
    state: adapters.State
    seed: int


class GroupedModel:
    """The base model with the factors of `count` clinics side by side; made once, used round after round."""

    def __init__(self, model: Any, count: int, scale: float) -> None:
        self.count = count
        self.layers: dict[str, GroupedLinear] = {}
        for name, layer in list(model.named_modules()):
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
                a, b = (getattr(layer, f"lora_{f}")["default"].weight.detach() for f in "AB")
                made = GroupedLinear(layer.base_layer, a.repeat(count, 1, 1), b.repeat(count, 1, 1), scale)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, made)
                self.layers[name] = made

    def parameters(self, factor: str) -> Iterator[tuple[str, Any]]:
        """(name in an adapter, parameter) of one factor, "A" or "B"."""
        for name, layer in self.layers.items():
            yield f"{name}.lora_{factor}.weight", layer.a if factor == "A" else layer.b

    def __len__(self) -> int:
        return self.count

    def train(
        self,
        jobs: Sequence[Job],
        factors: str,
        steps: int,
        lr: float,
        ratio: float,
        progress: Callable[[], object] = lambda: None,
    ) -> list[adapters.State]:
        """Train `factors` of each job for so many steps, as `client.trainer.train` does; the states, job by job.

        `lr` is the rate of the factors A, `ratio` times it that of B; `progress` is called after each step.
        """
        self._fill(jobs, factors)
        own = [copy.copy(job.batches) for job in jobs]
        for batches, job in zip(own, jobs, strict=True):
            batches.restart(job.seed)
        rates = {"A": lr, "B": lr * ratio}
        groups = [{"params": [p for _, p in self.parameters(f)], "lr": rates[f]} for f in factors]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, foreach=True)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.rate(step, steps))
        for _ in range(steps):
            self.losses(own).sum().backward()
            self._clip(factors)
            optimizer.step()
            falling.step()
            optimizer.zero_grad(set_to_none=True)
            progress()
        return [self._state(job, place, factors) for place, job in enumerate(jobs)]

    def _fill(self, jobs: Sequence[Job], factors: str) -> None:
        """Put the jobs' factors into the layers; only `factors` take gradients."""
        for factor in "AB":
            for name, parameter in self.parameters(factor):
                stacked = [torch.from_numpy(job.state[name]).float() for job in jobs]
                parameter.data = torch.stack(stacked).to(parameter.device)
                parameter.requires_grad_(factor in factors)
                parameter.grad = None

    def losses(self, own: Sequence[Batches]) -> Any:
        """Tensor (clinics,): the mean loss over the answers' tokens of each clinic's next batch."""
        *packed, features = self._packed(own)
        loss = own[0].cross_entropy(packed, own[0].seen(features), "none").view(self.count, -1)
        learnt = (packed[1] != IGNORE).view(self.count, -1).sum(1)
        return loss.sum(1) / learnt.to(loss.device)

    def _packed(self, own: Sequence[Batches]) -> list[Any]:
        """Ids, labels, segments, positions and features of all clinics' next batches, filled up to one shape."""
        chosen = [batches.next_groups() for batches in own]
        lines, pad = max(map(len, chosen)), own[0].processor.tokenizer.pad_token_id
        parts, features = [], []
        for batches, groups in zip(own, chosen, strict=True):
            filled = [*groups, *[groups[0]] * (lines - len(groups))]
            packed = pack(batches.encoded, filled, batches.prefix, pad)
            packed[1][len(groups) :] = IGNORE  # the lines that fill up teach nothing
            parts.append(packed)
            assert batches.features is not None
            features.append(batches.features[[batches.image_of[group[0]] for group in filled]])
        longest = max(packed[0].shape[1] for packed in parts)
        empty = (pad, IGNORE, -1, 0)
        wide = [
            torch.cat([torch.nn.functional.pad(p[n], (0, longest - p[n].shape[1]), value=empty[n]) for p in parts])
            for n in range(4)
        ]
        return [*wide, torch.cat(features)]

    def _clip(self, factors: str) -> None:
        """Bound each clinic's gradient by itself, as each would."""
        gradients = [p.grad for f in factors for _, p in self.parameters(f)]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        share = (schedule.CLIP / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient *= share[:, None, None]

    def _state(self, job: Job, place: int, factors: str) -> adapters.State:
        trained = {name: p[place].detach().cpu().numpy().copy() for f in factors for name, p in self.parameters(f)}
        return {**job.state, **trained}
