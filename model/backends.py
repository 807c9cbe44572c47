"""Backends: what answers a question about a picture. `TorchBackend` is PyTorch with bitsandbytes; others may follow.

`generate` takes several requests as one padded batch, yields each piece of text as it comes and each `Answer` as it
is finished. `confidence` is the probability the model itself gives to exactly this answer: the product of the chosen
tokens' probabilities, end mark included. It falls with the length of the answer and is no calibrated chance of being
right. Not covered: queueing of several callers (`kiosk.inference`), ONNX, sampling.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from model import attach, decode, llava, memory
from model.prompts import encode

_BUSY_SECONDS = 120  # how long an adapter swap waits for the answers in progress


class RequestRefused(ValueError):
    """A request cannot be answered (no question, picture of the wrong shape, too long); the message says why."""


@dataclass(frozen=True)
class Request:
    """One question about one picture: RGB uint8 (H, W, 3), the earlier turns as (question, answer) pairs."""

    image: np.ndarray
    question: str
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Token:
    """A piece of text of request `index`, as soon as it is known; joined they are the answer's text."""

    index: int
    text: str


@dataclass(frozen=True)
class Answer:
    """A finished answer and how it came about.

    `tokens` counts the chosen tokens with the end mark; `seconds` and `first_token_seconds` run from the start of the
    batch, picture included; `peak_bytes` is the batch's (see `model.memory`). `finish_reason` is "stop" or "length";
    `dropped_turns` counts the oldest earlier turns that did not fit any more. `image_reliant` is not known yet (None).
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


@dataclass
class _Row:
    """What is known so far about the answer to one request."""

    ids: list[int] = field(default_factory=list)
    probability: float = 1.0
    told: str = ""
    first: float = 0.0
    dropped: int = 0


class TorchBackend:
    """PyTorch on a CPU or CUDA device, weights at 32, 16, 8 or 4 bits, the adapter unmerged and swappable."""

    name = "torch"

    def __init__(self, model: Path, bits: int, adapter: Path | None = None, device: str | None = None) -> None:
        """Load the model folder; raises ModelError or AdapterRejected with one plain sentence."""
        self._setup(llava.load(model, bits, adapter=adapter, device=device))

    @classmethod
    def wrap(cls, loaded: llava.Loaded) -> TorchBackend:
        """A backend around a model that is loaded already (one being trained, say)."""
        self = cls.__new__(cls)
        self._setup(loaded)
        return self

    def _setup(self, loaded: llava.Loaded) -> None:
        self.loaded = loaded
        self._lock = threading.Lock()

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
        if not self._lock.acquire(timeout=_BUSY_SECONDS):
            raise RequestRefused(f"The model was busy for {_BUSY_SECONDS} seconds; install the adapter again later.")
        try:
            self.loaded = attach.swap(self.loaded, folder)
        finally:
            self._lock.release()

    def generate(self, requests: Sequence[Request]) -> Iterator[Token | tuple[int, Answer]]:
        """Answer the requests as one batch: `Token`s as they come, `(index, Answer)` for each when it is finished.

        Raises RequestRefused before anything is computed. The backend is busy until the iterator is used up or closed.
        """
        for number, request in enumerate(requests):
            _check(request, number)
        with self._lock, _evaluating(self.loaded.model):
            if requests:
                yield from self._answer(requests)

    def _answer(self, requests: Sequence[Request]) -> Iterator[Token | tuple[int, Answer]]:
        loaded, core = self.loaded, self.loaded.core
        began = time.perf_counter()
        memory.start(loaded.device)
        features, owners = decode.encode_pictures(core, loaded.processor, [r.image for r in requests])
        rows = [_Row() for _ in requests]
        prompts = [self._prompt(r, int(features.shape[1]), row) for r, row in zip(requests, rows, strict=True)]
        limits = [request.max_new_tokens for request in requests]
        for steps in decode.greedy(core, features, owners, prompts, limits, self._never()):
            now = time.perf_counter() - began
            for step in steps:
                row = rows[step.index]
                row.probability *= step.probability
                row.first = row.first or now
                row.ids.append(step.token)
                piece = self._piece(row, final=bool(step.finished))
                if piece:
                    yield Token(step.index, piece)
                if step.finished:
                    yield step.index, self._finish(row, now, step.finished)

    def _prompt(self, request: Request, image_tokens: int, row: _Row) -> list[int]:
        """Token ids of a request; the oldest turns are left out where all would not fit."""
        room = self.loaded.core.config.text_config.max_position_embeddings - request.max_new_tokens
        turns = [*request.history, (request.question, "")]
        while True:
            ids, _ = encode(self.loaded.processor.tokenizer, self.loaded.template, turns, image_tokens, None)
            if len(ids) <= room:
                return ids
            if len(turns) == 1:
                raise RequestRefused(f"The question is too long: {len(ids)} tokens, at most {room} fit; shorten it.")
            turns, row.dropped = turns[1:], row.dropped + 1

    def _never(self) -> list[int]:
        """Ids that are no text of an answer: the image mark, the template's markers, and the table's padding."""
        tokenizer, config = self.loaded.processor.tokenizer, self.loaded.core.config
        return [
            config.image_token_id,
            *tokenizer.all_special_ids,
            *range(len(tokenizer), config.text_config.vocab_size),
        ]

    def _piece(self, row: _Row, final: bool) -> str:
        """What can be shown now that could not before; a character still incomplete waits for its other bytes."""
        text = self.loaded.processor.tokenizer.decode(row.ids, skip_special_tokens=True).strip()
        if text.endswith("\ufffd") and not final:
            return ""
        piece, row.told = text[len(row.told) :], text
        return piece

    def _finish(self, row: _Row, seconds: float, why: str) -> Answer:
        loaded = self.loaded
        return Answer(
            text=row.told,
            confidence=row.probability,
            image_reliant=None,
            tokens=len(row.ids),
            seconds=seconds,
            first_token_seconds=row.first,
            peak_bytes=memory.stop(loaded.device),
            backend=self.name,
            reason=loaded.reason,
            bits=loaded.bits,
            device=loaded.device,
            model_id=loaded.path.name,
            base_sha256=loaded.base_sha256,
            adapter_sha256=loaded.adapter_sha256,
            finish_reason=why,
            dropped_turns=row.dropped,
        )


@contextmanager
def _evaluating(network: Any) -> Iterator[None]:
    """No dropout while answering; a network that was in training goes back to it."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _check(request: Request, number: int) -> None:
    image = request.image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise RequestRefused(
            f"Request {number} has no picture as RGB bytes (height, width, 3); decode the image first."
        )
    if not request.question.strip():
        raise RequestRefused(f"Request {number} asks nothing; write a question.")
    if request.max_new_tokens < 1:
        raise RequestRefused(f"Request {number} allows no answer; max_new_tokens must be at least 1.")
