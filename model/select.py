"""Open the backend that was asked for by name (`--backend`); choosing one by the folder is `model.backend_choice`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = ("torch", "onnx")


def open_backend(name: str, model: Path, bits: int, adapter: Path | None = None, device: str | None = None) -> Any:
    """A loaded `model.backends.Backend`. Raises ModelError or AdapterRejected, ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"There is no backend {name!r}; choose one of {', '.join(NAMES)}.")
    if name == "onnx":
        from model.onnx_backend import OnnxBackend

        return OnnxBackend(model, adapter, device)
    from model.backends import TorchBackend

    return TorchBackend(model, bits, adapter, device)
