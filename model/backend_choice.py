"""Open the backend that fits a folder: what `afya-model quantize` wrote it for, PyTorch for plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from model import manifest
from model.llava import ModelError

if TYPE_CHECKING:
    from model.backends import TorchBackend
    from model.onnx_backend import OnnxBackend


def open_backend(
    folder: Path, bits: int | None = None, adapter: Path | None = None, device: str | None = None
) -> TorchBackend | OnnxBackend:
    """A loaded backend; `bits` None: those of a quantized folder, else 4. Raises ModelError or AdapterRejected.

    Asking a quantized folder for other bits than it has is an error, not a silent change.
    """
    if not manifest.is_quantized(folder):
        from model.backends import TorchBackend

        return TorchBackend(folder, 4 if bits is None else bits, adapter, device)
    facts = manifest.read(folder)
    if bits is not None and bits != facts.get("bits"):
        raise ModelError(f"{folder} was quantized to {facts.get('bits')} bits, not {bits}; leave out --bits.")
    if facts.get("backend") == "torch":
        from model import quantized_torch
        from model.backends import KEEP_BYTES, TorchBackend

        return TorchBackend.wrap(quantized_torch.load(folder, adapter, device), keep_bytes=KEEP_BYTES)
    from model.onnx_backend import OnnxBackend

    return OnnxBackend(folder, adapter, device)


def bits_of(folder: Path, asked: int | None = None) -> int:
    """The bits to open a folder with: those asked for, else those it was quantized to, else 4. Raises ModelError."""
    if asked is not None:
        return asked
    return int(manifest.read(folder)["bits"]) if manifest.is_quantized(folder) else 4


def why(folder: Path) -> str:
    """Why a folder is opened with the backend it is opened with, in one sentence."""
    if manifest.is_quantized(folder):
        if manifest.read(folder).get("backend") == "torch":
            return "The folder holds weights quantized for PyTorch, so the torch backend answers."
        return "The folder was quantized for ONNX Runtime, so the onnx backend answers."
    return "The folder holds plain weights, so PyTorch quantizes them while it loads and the torch backend answers."
