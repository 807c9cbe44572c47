"""Read the weight files of a folder one at a time: what is in them without reading them, then tensor by tensor.

`.safetensors` and `pytorch_model*.bin`, single or sharded with an index. A `.bin` file is only read with
`weights_only=True`, so nothing in it can run. Files are mapped, not copied: at most one is open at a time, and its
pages leave memory when the next is opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INDEXED = ("model.safetensors", "pytorch_model.bin")
_EXTRA = ("mm_projector.bin", "non_lora_trainables.bin")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be imported; the message says what is wrong with which file and what to do."""


@dataclass(frozen=True)
class Entry:
    """One tensor on disk: file, key in it, shape, element type (torch.dtype)."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        count = 1
        for side in self.shape:
            count *= side
        return count * int(self.dtype.itemsize)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or {} where there is none. Raises CheckpointError for anything else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON; copy it again ({error}).") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object; copy it again.")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's main weights in order: safetensors before .bin, an index before single files.

    Empty if there are none. Raises CheckpointError when an index names a file that is not there.
    """
    for name in _INDEXED:
        index = read_json(folder / f"{name}.index.json").get("weight_map")
        if index:
            names = sorted({str(value) for value in index.values()})
            lost = [shard for shard in names if Path(shard).name != shard or not (folder / shard).is_file()]
            if lost:
                raise CheckpointError(f"{folder} lacks {lost[0]}, which its {name}.index.json names; copy it again.")
            return [folder / shard for shard in names]
        if (folder / name).is_file():
            return [folder / name]
        stem, suffix = name.split(".")
        if shards := sorted(folder.glob(f"{stem}-*.{suffix}")):
            return shards
    return []


def extra_files(folder: Path) -> list[Path]:
    """Files with a part of the weights that training leaves beside or instead of the main ones."""
    return [folder / name for name in _EXTRA if (folder / name).is_file()]


class Reader:
    """Opens weight files and hands out their tensors, one file at a time. Use as a context manager."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file that is open; tensors handed out before may be used only until then."""
        self._path, self._file = None, None

    def entries(self, path: Path) -> list[Entry]:
        """What a file holds, from its header. Raises CheckpointError for a file that is damaged or no weights."""
        import torch

        self._open(path)
        if path.suffix != ".safetensors":
            odd = [key for key, value in self._file.items() if not isinstance(value, torch.Tensor)]
            if odd:
                raise CheckpointError(f"{path} holds something other than weights ({odd[0]}); it is not read.")
            return [Entry(path, key, tuple(value.shape), value.dtype) for key, value in self._file.items()]
        return [Entry(path, key, *_header(self._file, key)) for key in self._file.keys()]  # noqa: SIM118 - no mapping

    def get(self, entry: Entry) -> Any:
        """The tensor of an entry (a view of the mapped file where possible)."""
        self._open(entry.path)
        if entry.path.suffix == ".safetensors":
            return self._file.get_tensor(entry.key)
        return self._file[entry.key]

    def _open(self, path: Path) -> None:
        if self._path != path:
            self.close()
            self._file = _opened(path)
            self._path = path


def _header(handle: Any, key: str) -> tuple[tuple[int, ...], Any]:
    import torch

    part = handle.get_slice(key)
    kinds = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
    kinds |= {"I8": "int8", "U8": "uint8", "BOOL": "bool", "I16": "int16"}
    kind = part.get_dtype()
    if kind not in kinds:
        raise CheckpointError(f"{key} is stored as {kind}, which is not read; convert the checkpoint to float16.")
    return tuple(part.get_shape()), getattr(torch, kinds[kind])


def _opened(path: Path) -> Any:
    import pickle

    import torch
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt", device="cpu")
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            found = torch.load(path, map_location="cpu", weights_only=True)  # the old format cannot be mapped
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as weights, so copy it again: {first}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no table of weights; it is not read.")
    return found


def entries_of(files: Sequence[Path], reader: Reader) -> list[Entry]:
    """All entries of several files, in their order. A key in two files of one checkpoint is refused."""
    found: list[Entry] = []
    seen: dict[str, Path] = {}
    for path in files:
        for entry in reader.entries(path):
            if entry.key in seen:
                raise CheckpointError(f"{entry.key} is both in {seen[entry.key]} and in {path}; remove one of them.")
            seen[entry.key] = path
            found.append(entry)
    return found
