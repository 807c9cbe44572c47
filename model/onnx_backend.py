"""The ONNX backend: a folder written by `afya-model quantize --backend onnx`, on a CPU or a CUDA device.

The folder is checked against its manifest, then opened; PyTorch is not needed. An adapter is handed to the
graph as inputs and so is swapped in the time that reading its file takes. Seen working on CPUs; the CUDA provider is
asked for and checked, but has not been measured.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model import adapters, manifest, onnx_adapter, onnx_session
from model.backends import KEEP_BYTES, Answer, Request, RequestRefused, Token
from model.llava import ModelError
from model.onnx_kept import Kept
from model.onnx_source import inputs
from model.prompts import Template, TemplateUnknown, template_of

if TYPE_CHECKING:
    from model.onnx_batch import OnnxBatch

_BUSY_SECONDS = 120  # how long an adapter swap waits for the answers in progress


@dataclass(frozen=True)
class OnnxLoaded:
    """A quantized folder that is open; the fields are named like those of `model.llava.Loaded`."""

    path: Path
    tokenizer: Any
    pixels: Callable[[np.ndarray], np.ndarray]
    bits: int
    device: str
    reason: str
    base_sha256: str
    adapter_sha256: str | None
    template: Template
    image_token_id: int
    image_tokens: int
    positions: int
    end_ids: frozenset[int]


class OnnxBackend:
    """ONNX Runtime on a CPU or CUDA device, the adapter unmerged and swappable.

    Keys and values of the last conversations are kept (`keep_bytes`, 0 for none), so that a question about a picture
    seen before computes only its new tokens.
    """

    name = "onnx"

    def __init__(
        self,
        model: Path,
        adapter: Path | None = None,
        device: str | None = None,
        *,
        threads: int | None = None,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        """Check and open the folder. Raises ModelError or AdapterRejected with one plain sentence."""
        model = Path(model)
        facts = manifest.verify(model)
        if facts.get("backend") != "onnx":
            raise ModelError(f"{model} was quantized for {facts.get('backend')}, not for ONNX Runtime.")
        count = threads or onnx_session.threads()
        self._shape: dict[str, Any] = facts["decoder"]
        self._vision = onnx_session.open_session(model / "vision.onnx", device, count)
        session = onnx_session.open_session(model / "decoder.onnx", device, count)
        place = "cuda:0" if session.get_providers()[0].startswith("CUDA") else "cpu"
        place = device if device and device.startswith("cuda:") else place
        self.decoder = onnx_session.Decoder(session, self._shape, place)
        self.embeddings = onnx_session.Embeddings(model / "embeddings.safetensors")
        reason = _reason(session, device, count, facts)
        self.loaded = _loaded(model, facts, place, reason)
        self.kept = Kept(keep_bytes)
        self.never = _never(self.loaded, self._shape["vocabulary"])
        self._facts = facts
        self._lock, self._free, self._open = threading.RLock(), threading.Condition(), 0
        if adapter is not None:
            self.swap_adapter(adapter)

    @property
    def reason(self) -> str:
        """Which providers really run, with how many threads and which weights, in one sentence."""
        return self.loaded.reason

    @property
    def adapter_sha256(self) -> str | None:
        """The adapter that answers, None for the bare base model."""
        return self.loaded.adapter_sha256

    @property
    def static_bytes(self) -> int:
        """Bytes of all weights, adapter included; of the embeddings only the rows in use are in memory."""
        listed = self._facts["files"].items()
        weights = sum(part["bytes"] for name, part in listed if name.endswith((".data", ".safetensors")))
        return int(weights) + self.decoder.lora_bytes

    def swap_adapter(self, folder: Path | None) -> None:
        """Answer with the adapter in `folder` from the next batch on; None is the bare base model.

        Waits for the answers in progress. An adapter that is refused leaves the former one answering.
        """
        lora: dict[str, np.ndarray] = {}
        digest = None
        if folder is not None:
            lora = onnx_adapter.inputs(Path(folder), self.loaded.base_sha256, self._shape)
            digest = adapters.sha256(Path(folder))
        with self._free:
            if not self._free.wait_for(lambda: not self._open, timeout=_BUSY_SECONDS):
                raise RequestRefused(
                    f"The model was busy for {_BUSY_SECONDS} seconds; install the adapter again later."
                )
            with self._lock:
                self.decoder.adapt(lora)
                self.loaded = replace(self.loaded, adapter_sha256=digest)
                self.kept.clear()

    def prepare(self, image: np.ndarray) -> None:
        """Compute what every question about this picture needs, before one is asked. Raises RequestRefused."""
        from model.batching import check

        request = Request(image, "-", max_new_tokens=1)
        check(request, 0)
        if self.kept.limit:
            with contextlib.closing(self.open_batch()) as batch:
                batch.prepare(request)

    def open_batch(self, keep: bool = True) -> OnnxBatch:
        """A batch that requests may join and leave at any token; `keep`: use what is kept of earlier questions."""
        from model.onnx_batch import OnnxBatch

        with self._free:
            self._open += 1
        try:
            return OnnxBatch(self, keep)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """A batch was closed."""
        with self._free:
            self._open -= 1
            self._free.notify_all()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """The model for this thread alone."""
        with self._lock:
            yield

    def generate(self, requests: Sequence[Request]) -> Iterator[Token | tuple[int, Answer]]:
        """Answer the requests as one batch: `Token`s as they come, `(index, Answer)` for each when it is finished.

        Raises RequestRefused before anything is computed. A single request uses and extends what is kept of earlier
        ones, several do not. The adapter is not swapped before the iterator is used up or closed.
        """
        if not requests:
            return
        with contextlib.closing(self.open_batch(keep=len(requests) == 1)) as batch:
            batch.add(list(enumerate(requests)))
            while batch.active:
                yield from batch.step()

    def features(self, image: np.ndarray) -> np.ndarray:
        """Projected features (tokens, hidden) of a picture, RGB uint8 (H, W, 3)."""
        found = self._vision.run(["features"], {"pixel_values": self.loaded.pixels(image)[None]})[0]
        return np.asarray(found[0])

    def head_length(self, ids: Sequence[int]) -> int:
        """How many ids of a prompt go up to the last image token."""
        return len(ids) - list(reversed(ids)).index(self.loaded.image_token_id)


def _loaded(model: Path, facts: dict[str, Any], place: str, reason: str) -> OnnxLoaded:
    try:
        template = template_of(model)
    except TemplateUnknown as error:
        raise ModelError(str(error)) from error
    tokenizer, pixels = inputs(model)
    return OnnxLoaded(
        path=model,
        tokenizer=tokenizer,
        pixels=pixels,
        bits=int(facts["bits"]),
        device=place,
        reason=reason,
        base_sha256=str(facts["base_sha256"]),
        adapter_sha256=None,
        template=template,
        image_token_id=int(facts["image_token_id"]),
        image_tokens=int(facts["image_tokens"]),
        positions=int(facts["decoder"]["positions"]),
        end_ids=frozenset(facts["end_ids"]),
    )


def _never(loaded: OnnxLoaded, vocabulary: int) -> np.ndarray:
    """Ids that are no text of an answer: the image mark, the template's markers, the table's padding; not the ends."""
    tokenizer = loaded.tokenizer
    banned = {loaded.image_token_id, *tokenizer.all_special_ids, *range(len(tokenizer), vocabulary)}
    return np.array(sorted(banned - loaded.end_ids), np.int64)


def _reason(session: Any, device: str | None, count: int, facts: dict[str, Any]) -> str:
    """Which providers really run and why, in one sentence."""
    _, why = onnx_session.providers(device)
    running = ", ".join(name.removesuffix("ExecutionProvider") for name in session.get_providers())
    weights = "float32" if facts["bits"] == 32 else f"int{facts['bits']} in blocks of {facts['block']}"
    vision = "float32" if facts["vision_bits"] == 32 else f"int{facts['vision_bits']}"
    return f"{why}; ONNX Runtime runs on {running} with {count} threads; {weights} weights, {vision} vision."
