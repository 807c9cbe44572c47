"""Open the backend that was asked for. A later edition chooses by itself; the names are those of `--backend`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = ("torch",)


def open_backend(name: str, model: Path, bits: int, adapter: Path | None = None, device: str | None = None) -> Any:
    """A loaded `model.backends.Backend`. Raises ModelError or AdapterRejected, ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"There is no backend {name!r}; choose one of {', '.join(NAMES)}.")
    from model.backends import TorchBackend

    return TorchBackend(model, bits, adapter, device)
