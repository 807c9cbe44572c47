"""Questions of several people answered together by PyTorch: each may join at any token, and leave when it wants.

Joining computes only what is not kept from earlier questions about the same picture. While one row's prompt is
computed the others wait: a new picture costs them its whole prefill. `Serial` gives the same interface to a backend
that can only answer one batch after another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from model import decode, memory, prefix_cache, reliance
from model.answer_text import AnswerText
from model.backends import Answer, Backend, Request, RequestRefused, Token
from model.prompts import encode

if TYPE_CHECKING:
    from model.backends import TorchBackend

Items = list[Token | tuple[int, Answer]]


@dataclass
class _Asked:
    """A request on its way and what is known so far about its answer."""

    request: Request
    picture: str  # its digest, "" where nothing is kept
    began: float
    text: AnswerText
    prompt: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    first: float = 0.0
    dropped: int = 0


class TorchBatch:
    """The rows that a TorchBackend answers together. Made by `TorchBackend.open_batch`; close it after use.

    `capacity` is how many rows somebody who queues should let in, `joins` how many between two tokens: a GPU computes
    many prompts in about the time of one, a CPU one after another.
    """

    capacity = 8

    def __init__(self, backend: TorchBackend, keep: bool) -> None:
        """An empty batch; `keep`: use and extend what is kept of earlier conversations."""
        self._backend, self._loaded = backend, backend.loaded
        self._keep = keep and backend.kept.limit > 0
        self._asked: dict[int, _Asked] = {}
        self._closed = False
        self.joins = self.capacity if self._loaded.device.startswith("cuda") else 1
        memory.start(self._loaded.device)
        self._rows = backend.open_rows()

    @property
    def active(self) -> tuple[int, ...]:
        """The requests that are being answered."""
        return tuple(self._asked)

    def add(self, requests: Sequence[tuple[int, Request]]) -> None:
        """Let requests join, each under a number of its own. Raises RequestRefused before anything is computed."""
        for number, request in requests:
            check(request, number)
        with self._backend.computing():
            began = time.perf_counter()
            asked = {number: self._described(request, began) for number, request in requests}
            prefixes = self._prefixes(asked)
            rows = [decode.Row(n, a.prompt, a.request.max_new_tokens, prefixes[n]) for n, a in asked.items()]
            self._rows.join(rows)
            self._asked |= asked

    def prepare(self, request: Request) -> None:
        """Keep the head of the request's picture, without answering."""
        with self._backend.computing():
            asked = self._described(request, time.perf_counter())
            if not self._backend.kept.count(asked.picture, self._loaded.core.config.image_token_id):
                self._computed({0: asked})

    def step(self) -> Items:
        """One more token for each request: the text that is known now, and the answers that are finished."""
        found: Items = []
        with self._backend.computing():
            for step in self._rows.step():
                asked = self._asked[step.index]
                now = time.perf_counter() - asked.began
                asked.log_probability += math.log(step.probability) if step.probability else -math.inf
                asked.first = asked.first or now
                asked.ids.append(step.token)
                if piece := asked.text.add(step.token, final=bool(step.finished)):
                    found.append(Token(step.index, piece))
                if step.finished:
                    found.append((step.index, self._finish(step.index, now, step.finished)))
        return found

    def drop(self, number: int) -> None:
        """Stop answering a request; one that is finished is no error."""
        self._rows.leave(number)
        self._asked.pop(number, None)

    def close(self) -> None:
        """Stop everything and free the backend for another adapter. May be called twice."""
        if not self._closed:
            self._closed = True
            self._asked.clear()
            self._rows.close()
            self._backend.leave()

    def _described(self, request: Request, began: float) -> _Asked:
        picture = prefix_cache.digest(request.image) if self._keep else ""
        return _Asked(request, picture, began, AnswerText(self._loaded.processor.tokenizer))

    def _prefixes(self, asked: dict[int, _Asked]) -> dict[int, decode.Layers]:
        """The keys and values that each prompt begins with, kept or computed now; fills in the prompts."""
        core, kept = self._loaded.core, self._backend.kept
        found: dict[int, decode.Layers] = {}
        for number, row in asked.items():
            if row.picture and (tokens := kept.count(row.picture, core.config.image_token_id)):
                row.prompt, row.dropped = self._prompt(row.request, tokens)
                layers = kept.longest(row.picture, row.prompt, decode.head_length(core, row.prompt))
                if layers is not None:
                    found[number] = layers
        return found | self._computed({number: row for number, row in asked.items() if number not in found}, True)

    def _computed(self, asked: dict[int, _Asked], asking: bool = False) -> dict[int, decode.Layers]:
        """The head (all up to the picture, included) of requests about pictures that are not kept.

        A single request that is `asking`: all but its last token, so that its prompt is computed in one go.
        """
        if not asked:
            return {}
        core = self._loaded.core
        pictures = [row.request.image for row in asked.values()]
        features, owners = decode.encode_pictures(core, self._loaded.processor, pictures)
        for row in asked.values():
            row.prompt, row.dropped = self._prompt(row.request, int(features.shape[1]))
        prompt = next(iter(asked.values())).prompt
        head = prompt[:-1] if asking and len(asked) == 1 else prompt[: decode.head_length(core, prompt)]
        layers = decode.heads(core, features, head)
        found = {n: decode.cut(layers, 0, len(head), owner) for n, owner in zip(asked, owners, strict=True)}
        for number, row in asked.items():
            if row.picture:
                self._backend.kept.keep(row.picture, head, found[number])
        return found

    def _prompt(self, request: Request, image_tokens: int) -> tuple[list[int], int]:
        """Token ids of a request, and how many of the oldest turns were left out because all would not fit."""
        loaded = self._loaded
        room = loaded.core.config.text_config.max_position_embeddings - request.max_new_tokens
        turns = [*request.history, (request.question, "")]
        for dropped in range(len(turns)):
            ids, _ = encode(loaded.processor.tokenizer, loaded.template, turns[dropped:], image_tokens, None)
            if len(ids) <= room:
                return ids, dropped
        raise RequestRefused(f"The question is too long: {len(ids)} tokens, at most {room} fit; shorten it.")

    def _finish(self, number: int, seconds: float, why: str) -> Answer:
        row, loaded = self._asked.pop(number), self._loaded
        if row.picture:
            ids = [*row.prompt, *row.ids[:-1]]
            self._backend.kept.keep(row.picture, ids, self._rows.layers(number), owned=True)
        nats, mark, cost = self._reliance(row) if row.request.reliance else (None, None, 0.0)
        return Answer(
            text=row.text.told,
            confidence=math.exp(row.log_probability),
            image_reliant=reliance.flag(mark),
            tokens=len(row.ids),
            seconds=seconds,
            first_token_seconds=row.first,
            peak_bytes=memory.stop(loaded.device),
            backend=self._backend.name,
            reason=loaded.reason,
            bits=loaded.bits,
            device=loaded.device,
            model_id=loaded.path.name,
            base_sha256=loaded.base_sha256,
            adapter_sha256=loaded.adapter_sha256,
            finish_reason=why,
            dropped_turns=row.dropped,
            reliance=mark,
            reliance_nats=nats,
            reliance_seconds=cost,
        )

    def _reliance(self, row: _Asked) -> tuple[float, str, float]:
        """Nats, mark and seconds of the pass with the picture blanked."""
        began = time.perf_counter()
        grey = self._described(Request(reliance.blank(row.request.image), "-"), began)
        core = self._loaded.core
        least = decode.head_length(core, row.prompt)
        layers = self._backend.kept.longest(grey.picture, row.prompt, least) if grey.picture else None
        layers = layers or self._computed({0: grey})[0]
        without = reliance.continued(core, layers, row.prompt, row.ids, self._backend.banned_ids())
        found = reliance.judge(row.log_probability - without)
        return found.nats, found.mark, time.perf_counter() - began


class Serial:
    """The interface of `TorchBatch` on a backend that answers one question after another, in order."""

    capacity = 1

    def __init__(self, backend: Backend) -> None:
        """Nothing is asked yet."""
        self._backend = backend
        self._waiting: dict[int, Request] = {}
        self._now: tuple[int, Iterator[Token | tuple[int, Answer]]] | None = None

    @property
    def active(self) -> tuple[int, ...]:
        """The requests that are being answered or wait for it."""
        return (*((self._now[0],) if self._now else ()), *self._waiting)

    def add(self, requests: Sequence[tuple[int, Request]]) -> None:
        """Let requests wait for their turn."""
        self._waiting |= dict(requests)

    def step(self) -> Items:
        """The next piece of the first request, or its answer. Raises what the backend raises; that request is gone."""
        if self._now is None:
            if not self._waiting:
                return []
            number = next(iter(self._waiting))
            self._now = number, iter(self._backend.generate([self._waiting.pop(number)]))
        number, items = self._now
        try:
            item = next(items, None)
        except BaseException:
            self._now = None
            raise
        if item is None:
            self._now = None
            return []
        return [(number, item[1]) if isinstance(item, tuple) else Token(number, item.text)]

    def drop(self, number: int) -> None:
        """Stop answering a request, or waiting for it."""
        self._waiting.pop(number, None)
        if self._now and self._now[0] == number:
            _close(self._now[1])
            self._now = None

    def close(self) -> None:
        """Stop everything."""
        for number in self.active:
            self.drop(number)


def open_batch(backend: Backend) -> TorchBatch | Serial:
    """A batch on any backend: its own where it has one, else one question after another."""
    opened = getattr(backend, "open_batch", None)
    return opened() if opened else Serial(backend)


def _close(items: Iterator[Any]) -> None:
    """Leaving a generator early frees the model now, not when it is collected."""
    if hasattr(items, "close"):
        items.close()


@contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """No dropout while answering; a network that was in training goes back to it."""
    if not network.training:
        yield
        return
    network.eval()
    try:
        yield
    finally:
        network.train()


def check(request: Request, number: int) -> None:
    """Raise RequestRefused for a request without RGB bytes, question or room for an answer."""
    image = request.image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise RequestRefused(
            f"Request {number} has no picture as RGB bytes (height, width, 3); decode the image first."
        )
    if not request.question.strip():
        raise RequestRefused(f"Request {number} asks nothing; write a question.")
    if request.max_new_tokens < 1:
        raise RequestRefused(f"Request {number} allows no answer; max_new_tokens must be at least 1.")
