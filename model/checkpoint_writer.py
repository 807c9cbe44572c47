"""Write a large model to safetensors files tensor by tensor, so that no more than one tensor is in memory.

The layout is that of the safetensors format: eight bytes with the length of the header, the header as JSON (name,
element type, shape, offsets), then the raw bytes in the order of the header. Several files come with the index that
transformers reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import files

SHARD_BYTES = 2 * 2**30  # of one output file; only a single larger tensor makes a larger one
_KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Piece:
    """One tensor to be written: its name in the file, shape, element type (torch.dtype), and how to make it."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        count = int(self.dtype.itemsize)
        for side in self.shape:
            count *= side
        return count


def write(
    pieces: Sequence[Piece], folder: Path, shard_bytes: int | None = None, progress: Callable[[int], None] | None = None
) -> list[Path]:
    """Write the pieces in their order to `model.safetensors`, or to numbered files and an index if they are many.

    `progress` gets the number of bytes after each tensor. Every file is flushed to the disk. Raises OSError when the
    disk refuses, ValueError when a piece makes another shape or type than it said.
    """
    shards = list(_shards(pieces, shard_bytes or SHARD_BYTES))
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        _file(folder / name, shard, progress)
    if len(shards) > 1:
        places = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        total = sum(piece.nbytes for piece in pieces)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        files.write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=1).encode())
    return [folder / name for name in names]


def _shards(pieces: Sequence[Piece], limit: int) -> Iterator[list[Piece]]:
    shard: list[Piece] = []
    held = 0
    for piece in pieces:
        if shard and held + piece.nbytes > limit:
            yield shard
            shard, held = [], 0
        shard.append(piece)
        held += piece.nbytes
    yield shard


def _file(path: Path, pieces: Sequence[Piece], progress: Callable[[int], None] | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for piece in pieces:
        kind = _KINDS[str(piece.dtype).removeprefix("torch.")]
        ends = [place, place + piece.nbytes]
        header[piece.name] = {"dtype": kind, "shape": list(piece.shape), "data_offsets": ends}
        place = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the file: tensors begin at a multiple of eight bytes
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            out.write(_bytes(piece))
            if progress is not None:
                progress(piece.nbytes)
        out.flush()
        os.fsync(out.fileno())


def _bytes(piece: Piece) -> memoryview:
    """The raw little-endian bytes of a piece, without a copy where it is already as it should be."""
    import torch

    tensor = piece.make()
    if tuple(tensor.shape) != piece.shape:
        raise ValueError(f"{piece.name} has shape {tuple(tensor.shape)} instead of {piece.shape}")
    tensor = tensor.detach().to(piece.dtype).contiguous()
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
