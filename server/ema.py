"""Exponential moving average of the weights, the ones that are shipped (Polyak and Juditsky 1992)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Ema:
    """Float32 averages of a module's parameters; early steps use a faster average so that the start is forgotten."""

    def __init__(self, module: Any, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: Any, step: int) -> None:
        """Move the average towards the weights after optimiser step `step` (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        names = list(self.average)
        weights = dict(module.named_parameters())
        torch._foreach_lerp_([self.average[n] for n in names], [weights[n].detach().float() for n in names], 1 - decay)

    @contextmanager
    def applied(self, module: Any) -> Iterator[None]:
        """The module holds the averaged weights inside the block."""
        kept = {name: p.detach().clone() for name, p in module.named_parameters()}
        self._copy(module, self.average)
        try:
            yield
        finally:
            self._copy(module, kept)

    @torch.no_grad()
    def _copy(self, module: Any, values: dict[str, Any]) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])

    def save(self, path: Path) -> None:
        """Write the averages as safetensors."""
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in self.average.items()}, path)

    def load(self, path: Path) -> None:
        """Read averages written by `save`."""
        from safetensors.torch import load_file

        for name, value in load_file(path).items():
            self.average[name].copy_(value)
