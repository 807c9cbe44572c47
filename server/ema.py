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
        self.parameters = dict(module.named_parameters())
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after optimiser step `step` (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averaged weights inside the block."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: dict[str, Any]) -> None:
        for name, parameter in self.parameters.items():
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
