"""ONNX Runtime sessions of a quantized folder: the vision graph, the decoder with its cache, the embedding table.

The cache of a row is written in place: the graph's past and present are the same memory, so a token costs no copy.
Threads spin while a run lasts and sleep between runs. The graphs are those of `model.onnx_decoder` and
`model.onnx_vision`.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.llava import ModelError

_STEP = 64  # the cache grows by so many positions
_CHUNK = 64  # positions of a prompt that are run together: bounds the memory of the activations
_SILENT = 4  # ONNX Runtime's log level "fatal": what matters is raised


def providers(device: str | None) -> tuple[list[str], str]:
    """Execution providers to ask for and why. `device` None: CUDA where its driver and provider are here."""
    import os

    import onnxruntime

    known = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    wanted = device or ("cuda" if known and os.path.exists("/dev/nvidiactl") else "cpu")
    if wanted == "cpu":
        return ["CPUExecutionProvider"], "CPU was asked for" if device else "no CUDA device for ONNX Runtime: CPU"
    if not wanted.startswith("cuda"):
        raise ModelError(f"The ONNX backend has no device {wanted!r}; choose cpu or cuda.")
    return ["CUDAExecutionProvider", "CPUExecutionProvider"], "CUDA device"


def threads() -> int:
    """Physical cores this process may use."""
    import os

    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def open_session(path: Path, device: str | None, count: int) -> Any:
    """A session that really runs where it was asked to. Raises ModelError, also where CUDA fell back silently."""
    import onnxruntime

    wanted, _ = providers(device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = count, _SILENT
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")  # a token is 300 short products...
    options.add_session_config_entry("session.force_spinning_stop", "1")  # ...but nobody spins between two runs
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    onnxruntime.set_default_logger_severity(_SILENT)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:  # the runtime raises classes of its own that are no common kind
        raise ModelError(f"{path} cannot be loaded: {str(error).splitlines()[0][:200]}") from error
    if session.get_providers()[0] != wanted[0]:
        raise ModelError(f"{wanted[0]} was asked for but runs only {session.get_providers()}; choose --device cpu.")
    return session


class Embeddings:
    """The token embeddings: a table that stays on the disk until its rows are needed."""

    def __init__(self, path: Path) -> None:
        """Map the one tensor of a safetensors file."""
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        tensor = header["embeddings"]
        self._kind = np.dtype({"F16": np.float16, "F32": np.float32}[tensor["dtype"]])
        self._begin = 8 + size + tensor["data_offsets"][0]
        self.shape = int(tensor["shape"][0]), int(tensor["shape"][1])
        self._file, self._lock = open(path, "rb", buffering=0), threading.Lock()  # noqa: SIM115 - closed below
        weakref.finalize(self, self._file.close)

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """(ids, hidden) float32. Read, not mapped: a page fault brings 16 pages, all counted as this process's."""
        places, width = np.asarray(ids, np.int64), self.shape[1] * self._kind.itemsize
        if places.size and not 0 <= places.min() <= places.max() < self.shape[0]:
            raise IndexError(f"Token ids go from 0 to {self.shape[0] - 1}.")
        with self._lock:
            parts = [self._row(int(place) * width, width) for place in places]
        return np.frombuffer(b"".join(parts), self._kind).astype(np.float32).reshape(len(places), -1)

    def _row(self, start: int, width: int) -> bytes:
        self._file.seek(self._begin + start)
        return self._file.read(width)


class Cache:
    """Keys and values of several rows, one line each: arrays (lines, heads, room, width) for every layer."""

    def __init__(self, layers: int, heads: int, width: int, device: str) -> None:
        """No lines yet."""
        self._heads, self._width, self._device = heads, width, device
        self.lines = self.room = 0
        self.parts: list[Any] = [None] * (2 * layers)

    def ensure(self, lines: int, room: int) -> None:
        """Make room, keeping what is there."""
        if lines <= self.lines and room <= self.room:
            return
        lines, room = max(lines, self.lines), max(-(-room // _STEP) * _STEP, self.room)
        for number, old in enumerate(self.parts):
            new = self._zeros((lines, self._heads, room, self._width))
            if old is not None:
                new[: self.lines, :, : self.room] = old
            self.parts[number] = new
        self.lines, self.room = lines, room

    def _zeros(self, shape: tuple[int, ...]) -> Any:
        if self._device == "cpu":
            return np.zeros(shape, np.float32)
        import torch

        return torch.zeros(shape, dtype=torch.float32, device=self._device)

    def cut(self, line: int, length: int) -> list[Any]:
        """A copy of the first `length` positions of a line, (heads, length, width) for every array."""
        found = [part[line, :, :length] for part in self.parts]
        return [part.copy() if isinstance(part, np.ndarray) else part.clone() for part in found]

    def put(self, line: int, parts: Sequence[Any], length: int) -> None:
        """Write the first `length` positions of what `cut` returned into a line."""
        for mine, theirs in zip(self.parts, parts, strict=True):
            mine[line, :, :length] = theirs[:, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one line to another."""
        for part in self.parts:
            part[target, :, :length] = part[source, :, :length]


class Decoder:
    """The decoder graph, with the inputs of an adapter or bare."""

    def __init__(self, session: Any, shape: Mapping[str, int], device: str) -> None:
        """`shape`: layers, kv_heads, width and vocabulary as in the manifest."""
        self._session, self._shape, self._device = session, dict(shape), device
        self._lora: dict[str, Any] = {}
        self.lora_bytes = 0

    def adapt(self, lora: Mapping[str, np.ndarray]) -> None:
        """Use these LoRA inputs from now on; none for the bare model."""
        from onnxruntime import OrtValue

        kind, _, number = self._device.partition(":")
        place = (kind, int(number or 0))
        self._lora = {name: OrtValue.ortvalue_from_numpy(array, *place) for name, array in lora.items()}
        self.lora_bytes = sum(array.nbytes for array in lora.values())

    def cache(self) -> Cache:
        """An empty cache for this decoder."""
        return Cache(self._shape["layers"], self._shape["kv_heads"], self._shape["width"], self._device)

    def run(self, embedded: np.ndarray, cache: Cache, first: int, held: Sequence[int], wanted: int = 1) -> np.ndarray:
        """Logits (rows, wanted, vocabulary) of the last `wanted` positions of `embedded` (rows, new, hidden).

        Rows are the cache's lines from `first` on, with `held` positions in each; several rows only where `new` is 1.
        """
        rows, new, _ = embedded.shape
        while rows == 1 and new > _CHUNK and wanted <= new - _CHUNK:
            self.run(embedded[:, :_CHUNK], cache, first, held)
            embedded, held, new = embedded[:, _CHUNK:], [held[0] + _CHUNK], new - _CHUNK
        lengths = np.asarray(held, np.int32) + np.int32(new - 1)
        places = (np.arange(rows)[:, None] * new + np.arange(new - wanted, new)).reshape(-1)
        inputs = {
            "inputs_embeds": np.ascontiguousarray(embedded, np.float32),
            "lengths": lengths,
            "total": np.array([lengths.max() + 1], np.int32),
            "places": places.astype(np.int64),
        }
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, value in self._lora.items():
            binding.bind_ortvalue_input(name, value)
        kind, _, number = self._device.partition(":")
        for place, part in enumerate(cache.parts):
            view = part[first : first + rows]
            pointer = view.ctypes.data if isinstance(view, np.ndarray) else view.data_ptr()
            name = f"{('key', 'value')[place % 2]}.{place // 2}"
            memory = (kind, int(number or 0), np.float32, tuple(view.shape), pointer)
            binding.bind_input(f"past_{name}", *memory)
            binding.bind_output(f"present_{name}", *memory)
        logits = np.empty((rows * wanted, self._shape["vocabulary"]), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits.reshape(rows, wanted, -1)
