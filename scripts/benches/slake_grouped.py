"""The trainings of many clinics in one process: their factors side by side in each pass of the one frozen base.

A step costs one pass however many they are; on a GPU, which a small model leaves idle, that is a fraction of the time.
Batches, schedule, optimizer and clipping are those of the clinics' trainer (`client.trainer`). Not here: which clinics
and what becomes of their factors (`slake_together`), and an adapter in the vision tower.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from client import steps as schedule
from client.batches import Batches, Group
from model import adapters
from model.collate import Encoded
from model.packing import pack
from model.prompts import IGNORE


class GroupedLinear(torch.nn.Module):
    """A frozen layer beside the factors of many clinics: A (clinics, rank, in), B (clinics, out, rank), scale s.

    The input's rows are the clinics' in turn, equally many each. The layer's weights are unpacked once, here, from
    whatever bits it has, instead of in each pass.
    """

    def __init__(self, layer: Any, a: Any, b: Any, scale: float) -> None:
        super().__init__()
        self.bias, layer.bias = layer.bias, None
        kept = getattr(layer, "compute_dtype", None) or layer.weight.dtype
        each = torch.eye(layer.in_features, dtype=kept, device=layer.weight.device, requires_grad=True)
        self.weight, layer.bias = layer(each).detach().T.contiguous(), self.bias
        self.scale = scale
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x: Any) -> Any:
        """What the frozen layer gives, plus s B A x of the clinic whose row it is."""
        rows = x.reshape(len(self.a), -1, x.shape[-1]).to(self.a.dtype)
        update = torch.bmm(torch.bmm(rows, self.a.transpose(1, 2)), self.b.transpose(1, 2) * self.scale)
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        found = torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)
        return found + update.reshape(found.shape).to(found.dtype)


@dataclass(frozen=True)
class Job:
    """One clinic's training in a round: samples, the factors it begins with, the seed of its samples' order, rates.

    `lr` is the rate of the factors A, `ratio` times it that of B.
    """

    batches: Batches
    state: adapters.State
    seed: int
    lr: float
    ratio: float

    def rate(self, factor: str) -> float:
        """Rate of the factors "A" or "B"."""
        return self.lr * (self.ratio if factor == "B" else 1.0)


class Table:
    """The rows and the pictures' features of several clinics, one after the other."""

    def __init__(self, several: Sequence[Batches]) -> None:
        self.first: dict[int, tuple[int, int]] = {}  # by whose rows they are: number of its first row and picture
        self.encoded: list[Encoded] = []
        pictures = 0
        for batches in several:
            self.first[id(batches.encoded)] = len(self.encoded), pictures
            self.encoded += [_arrays(item) for item in batches.encoded]
            pictures += len(batches.pictures)
        self.features = torch.cat([batches.features for batches in several if batches.features is not None])


def _arrays(item: Any) -> Any:
    """An encoded row with arrays for lists, which `pack` copies faster."""
    return replace(item, ids=np.array(item.ids), labels=np.array(item.labels))


class GroupedModel:
    """The base model with the factors of `count` clinics side by side, and all samples; made once for all rounds."""

    def __init__(self, model: Any, several: Sequence[Batches], count: int, scale: float) -> None:
        self.count, self.table = count, Table(several)
        self.layers: dict[str, GroupedLinear] = {}
        for name, layer in list(model.named_modules()):
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
                a, b = (getattr(layer, f"lora_{f}")["default"].weight.detach() for f in "AB")
                made = GroupedLinear(layer.base_layer, a.repeat(count, 1, 1), b.repeat(count, 1, 1), scale)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, made)
                self.layers[name] = made
        self.flat = {factor: self._flat(factor) for factor in "AB"}

    def _flat(self, factor: str) -> Any:
        """All factors "A" or "B" as one parameter (clinics, values), of which those of the layers are views."""
        own = [p for _, p in self.parameters(factor)]
        whole = torch.nn.Parameter(torch.cat([p.detach().flatten(1) for p in own], 1))
        whole.grad = torch.zeros_like(whole)
        sizes = [p[0].numel() for p in own]
        for p, data, grad in zip(own, whole.data.split(sizes, 1), whole.grad.split(sizes, 1), strict=True):
            p.data, p.grad = data.view(p.shape), grad.view(p.shape)
        return whole

    def parameters(self, factor: str) -> Iterator[tuple[str, Any]]:
        """(name in an adapter, parameter) of one factor, "A" or "B"."""
        for name, layer in self.layers.items():
            yield f"{name}.lora_{factor}.weight", layer.a if factor == "A" else layer.b

    def __len__(self) -> int:
        return self.count

    def train(
        self, jobs: Sequence[Job], factors: str, steps: int, progress: Callable[[], object] = lambda: None
    ) -> list[adapters.State]:
        """Train `factors` of each job for so many steps, as `client.trainer.train` does; the states, job by job.

        `progress` is called after each step.
        """
        self._fill(jobs, factors)
        own = [copy.copy(job.batches) for job in jobs]
        for batches, job in zip(own, jobs, strict=True):
            batches.restart(job.seed)
        highest = {f: max(job.rate(f) for job in jobs) for f in factors}
        groups = [{"params": [self.flat[f]], "lr": highest[f]} for f in factors]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        shares = {f: self._shares([job.rate(f) / highest[f] for job in jobs]) for f in factors}
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.rate(step, steps))
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout")  # views with gaps: intended
        for _ in range(steps):
            self.losses(own).sum().backward()
            self._clip(factors)
            self._step(optimizer, shares)
            falling.step()
            optimizer.zero_grad(set_to_none=False)
            progress()
        return [self._state(job, place, factors) for place, job in enumerate(jobs)]

    def _fill(self, jobs: Sequence[Job], factors: str) -> None:
        """Put the jobs' factors into the layers; only `factors` take gradients."""
        for factor in "AB":
            for name, parameter in self.parameters(factor):
                stacked = torch.stack([torch.from_numpy(job.state[name]).float() for job in jobs])
                parameter.data.copy_(stacked)
                parameter.requires_grad_(factor in factors)
            self.flat[factor].grad.zero_()

    def losses(self, own: Sequence[Batches]) -> Any:
        """Tensor (clinics,): the mean loss over the answers' tokens of each clinic's next batch."""
        *packed, features = self._packed(own)
        loss = own[0].cross_entropy(packed, own[0].seen(features), "none").view(self.count, -1)
        learnt = (packed[1] != IGNORE).view(self.count, -1).sum(1)
        return loss.sum(1) / learnt.to(loss.device)

    def _packed(self, own: Sequence[Batches]) -> list[Any]:
        """Ids, labels, segments, positions and features of all clinics' next batches, equally many lines each."""
        chosen = [batches.next_groups() for batches in own]
        most = max(map(len, chosen))
        lines: list[Group] = []
        pictures: list[int] = []
        idle: list[int] = []
        for batches, groups in zip(own, chosen, strict=True):
            first_row, first_picture = self.table.first[id(batches.encoded)]
            idle += range(len(lines) + len(groups), len(lines) + most)
            filled = [*groups, *[groups[0]] * (most - len(groups))]
            lines += [[first_row + row for row in group] for group in filled]
            pictures += [first_picture + batches.image_of[group[0]] for group in filled]
        packed = pack(self.table.encoded, lines, own[0].prefix, own[0].processor.tokenizer.pad_token_id)
        packed[1][idle] = IGNORE  # the lines that fill up teach nothing
        return [*packed, self.table.features[pictures]]

    def _clip(self, factors: str) -> None:
        """Bound each clinic's gradient by itself, as each would."""
        norms = torch.stack([self.flat[f].grad.norm(dim=1) for f in factors]).norm(dim=0)
        share = (schedule.CLIP / (norms + 1e-6)).clamp(max=1.0)
        for factor in factors:
            self.flat[factor].grad *= share[:, None]

    def _shares(self, shares: Sequence[float]) -> Any:
        """Tensor (clinics, 1), or None where all are 1."""
        return torch.tensor(shares, device=self.table.features.device)[:, None] if min(shares) < 1 else None

    def _step(self, optimizer: Any, shares: Mapping[str, Any]) -> None:
        """Adam's step, of which each clinic goes its share: the step is proportional to the rate."""
        before = {f: self.flat[f].detach().clone() for f, share in shares.items() if share is not None}
        optimizer.step()
        for factor, old in before.items():
            moved = self.flat[factor].data
            moved.copy_(torch.lerp(old, moved, shares[factor]))

    def _state(self, job: Job, place: int, factors: str) -> adapters.State:
        trained = {name: p[place].detach().cpu().numpy().copy() for f in factors for name, p in self.parameters(f)}
        return {**job.state, **trained}
