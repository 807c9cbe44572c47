"""Backends: what answers a question about a picture. `TorchBackend` is PyTorch with bitsandbytes; others may follow.

`generate` takes several requests as one padded batch, yields each piece of text as it comes and each `Answer` as it
is finished. `confidence` is the probability the model itself gives to exactly this answer: the product of the chosen
tokens' probabilities, end mark included. It falls with the length of the answer and is no calibrated chance of being
right. Not covered: queueing of several callers (`kiosk.inference`), ONNX, sampling.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from model import attach, llava, memory

if TYPE_CHECKING:
    from model.batching import TorchBatch
    from model.cuda_batch import GraphBatch, Recorded
    from model.decode import Batch

KEEP_BYTES = 256 * 2**20  # keys and values kept of conversations: seven on a 1.5B model in float32
_BUSY_SECONDS = 120  # how long an adapter swap waits for the answers in progress


class RequestRefused(ValueError):
    """A request cannot be answered (no question, picture of the wrong shape, too long); the message says why."""


@dataclass(frozen=True)
class Request:
    """One question about one picture: RGB uint8 (H, W, 3), the earlier turns as (question, answer) pairs.

    `reliance` asks for one more pass, with the picture blanked, to see whether the answer depends on it.
    """

    image: np.ndarray
    question: str
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int = 64
    reliance: bool = False


@dataclass(frozen=True)
class Token:
    """A piece of text of request `index`, as soon as it is known; joined they are the answer's text."""

    index: int
    text: str


@dataclass(frozen=True)
class Answer:
    """A finished answer and how it came about.

    `tokens` counts the chosen tokens with the end mark; `seconds` and `first_token_seconds` run from the moment that
    the request joined, picture included; `peak_bytes` is the batch's (see `model.memory`). `finish_reason` is "stop"
    or "length"; `dropped_turns` counts the oldest earlier turns that did not fit any more. `reliance` is a mark of
    `model.reliance`, `reliance_nats` the number behind it, `reliance_seconds` what the extra pass took beside
    `seconds`; `image_reliant` is True, False, or None where the mark is "unsure" or was not asked for.
    """

    text: str
    confidence: float
    image_reliant: bool | None
    tokens: int
    seconds: float
    first_token_seconds: float
    peak_bytes: int
    backend: str
    reason: str
    bits: int
    device: str
    model_id: str
    base_sha256: str
    adapter_sha256: str | None
    finish_reason: str
    dropped_turns: int = 0
    reliance: str | None = None
    reliance_nats: float | None = None
    reliance_seconds: float = 0.0


class Backend(Protocol):
    """What the kiosk and the evaluation need of a backend."""

    name: str

    @property
    def reason(self) -> str:
        """Why this device and these types."""

    @property
    def adapter_sha256(self) -> str | None:
        """The adapter that answers, None for the bare base model."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Token | tuple[int, Answer]]:
        """Answer the requests as one batch."""

    def swap_adapter(self, folder: Path | None) -> None:
        """Answer with this adapter from now on; None is the bare base model."""


class TorchBackend:
    """PyTorch on a CPU or CUDA device, weights at 32, 16, 8 or 4 bits, the adapter unmerged and swappable.

    Keys and values of the last conversations are kept (`keep_bytes`, 0 for none), so that a question about a picture
    seen before computes only its new tokens.
    """

    name = "torch"

    def __init__(
        self,
        model: Path,
        bits: int,
        adapter: Path | None = None,
        device: str | None = None,
        *,
        keep_bytes: int = KEEP_BYTES,
        recorded: bool = True,
    ) -> None:
        """Load the model folder; raises ModelError or AdapterRejected with one plain sentence.

        `recorded`: decode on a CUDA device by recorded steps where the model allows it (`model.cuda_decoder`).
        """
        loaded = llava.load(model, bits, adapter=adapter, device=device)
        self._setup(loaded, keep_bytes, recorded and loaded.device.startswith("cuda"))

    @classmethod
    def wrap(cls, loaded: llava.Loaded, *, keep_bytes: int = 0) -> TorchBackend:
        """A backend around a loaded model. Keep nothing (the default) of one being trained: its weights change."""
        self = cls.__new__(cls)
        self._setup(loaded, keep_bytes)
        return self

    def _setup(self, loaded: llava.Loaded, keep_bytes: int, record: bool = False) -> None:
        from model.prefix_cache import PrefixCache

        self.loaded = loaded
        self._recorded: Recorded | None = None  # made for the adapter that answers, at the first question
        self._record = record
        if record:
            from model.cuda_decoder import unsuitable

            why = unsuitable(loaded.core)
            how = f"tokens one by one by PyTorch: {why}." if why else "tokens by recorded steps."
            self._record, self.loaded = not why, replace(loaded, reason=f"{loaded.reason[:-1]}; {how}")
        self.kept = PrefixCache(keep_bytes)
        self._lock = threading.RLock()  # held while something is computed
        self._free = threading.Condition()
        self._open = 0  # batches that are open: the adapter stays as it is until they are closed
        self._banned: list[int] | None = None
        self._tidy = False  # freed memory was handed back after the first batch, which packs 4-bit weights
        memory.give_back()

    @property
    def reason(self) -> str:
        """Why this device and these types, in one sentence."""
        return self.loaded.reason

    @property
    def adapter_sha256(self) -> str | None:
        """The adapter that answers, None for the bare base model."""
        return self.loaded.adapter_sha256

    @property
    def static_bytes(self) -> int:
        """Bytes of all weights as they lie in memory, adapter included."""
        return memory.static_bytes(self.loaded.model)

    def swap_adapter(self, folder: Path | None) -> None:
        """Answer with the adapter in `folder` from the next batch on; None is the bare base model.

        Waits for the answers in progress. An adapter that is refused leaves the former one answering.
        """
        with self._free:
            if not self._free.wait_for(lambda: not self._open, timeout=_BUSY_SECONDS):
                raise RequestRefused(f"The model was busy for {_BUSY_SECONDS} seconds; install the adapter later.")
            with self._lock:
                try:
                    self.loaded = attach.swap(self.loaded, folder)
                finally:
                    self.kept.clear()
                    self._recorded = None

    def prepare(self, image: np.ndarray) -> None:
        """Compute what every question about this picture needs, before one is asked. Raises RequestRefused."""
        from model.batching import TorchBatch, check

        request = Request(image, "-", max_new_tokens=1)
        check(request, 0)
        if self.kept.limit:
            with contextlib.closing(self.open_batch()) as batch:
                assert isinstance(batch, TorchBatch)
                batch.prepare(request)

    def open_batch(self, keep: bool = True) -> TorchBatch:
        """A batch that requests may join and leave at any token; `keep`: use what is kept of earlier questions."""
        from model.batching import TorchBatch

        with self._free:
            self._open += 1
        try:
            return TorchBatch(self, keep)
        except BaseException:
            self.leave()
            raise

    def open_rows(self) -> Batch | GraphBatch:
        """Empty rows for a batch: recorded steps where the device and the model allow them."""
        from model import cuda_batch, decode

        if not self._record:
            return decode.Batch(self.loaded.core, self.banned_ids())
        with self._lock:
            if self._recorded is None:
                self._recorded = cuda_batch.Recorded(self.loaded.core, self.banned_ids())
        return cuda_batch.GraphBatch(self._recorded)

    def leave(self) -> None:
        """A batch was closed."""
        with self._free:
            self._open -= 1
            self._free.notify_all()
            first, self._tidy = not self._tidy, True
        if first:
            memory.give_back()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """The model for this thread alone, in eval mode."""
        from model.batching import evaluating

        with self._lock, evaluating(self.loaded.model):
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

    def banned_ids(self) -> list[int]:
        """Ids that are no text of an answer: the image mark, the template's markers, and the table's padding."""
        if self._banned is None:
            tokenizer, config = self.loaded.processor.tokenizer, self.loaded.core.config
            rest = range(len(tokenizer), config.text_config.vocab_size)
            self._banned = [config.image_token_id, *tokenizer.all_special_ids, *rest]
        return self._banned
