"""Questions of several people answered together by ONNX Runtime: each may join at any token, and leave when it wants.

The same interface as `model.batching.TorchBatch`. Every row has a line of the cache; a row that joins copies what
another row or an earlier conversation about the same picture already computed and runs only the rest of its prompt,
by itself (the attention kernel takes several rows only for one new token each). While it runs, the others wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from model import memory, reliance
from model.answer_text import AnswerText
from model.backends import Answer, Request, RequestRefused, Token
from model.batching import Items, check
from model.prefix_cache import common, digest
from model.prompts import encode

if TYPE_CHECKING:
    from model.onnx_backend import OnnxBackend


@dataclass
class _Row:
    """A request on its way. `held` are the ids in its line of the cache, `scores` what follows them (or None)."""

    number: int
    request: Request
    picture: str
    began: float
    prompt: list[int]
    dropped: int
    text: AnswerText
    held: list[int] = field(default_factory=list)
    scores: Any = None
    ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    first: float = 0.0


class OnnxBatch:
    """The rows that an OnnxBackend answers together. Made by `OnnxBackend.open_batch`; close it after use.

    `capacity` and `joins` are those of `model.batching.TorchBatch`.
    """

    capacity, joins = 8, 1

    def __init__(self, backend: OnnxBackend, keep: bool) -> None:
        """An empty batch; `keep`: use and extend what is kept of earlier conversations."""
        self._backend, self._loaded = backend, backend.loaded
        self._keep = keep and backend.kept.limit > 0
        self._rows: list[_Row] = []  # in the order of their lines
        self._cache = backend.decoder.cache()
        self._closed = False
        memory.start(self._loaded.device)

    @property
    def active(self) -> tuple[int, ...]:
        """The requests that are being answered."""
        return tuple(row.number for row in self._rows)

    def add(self, requests: Sequence[tuple[int, Request]]) -> None:
        """Let requests join, each under a number of its own. Raises RequestRefused before anything is computed."""
        began = time.perf_counter()
        for number, request in requests:
            check(request, number)
        rows = [self._described(number, request, began) for number, request in requests]
        with self._backend.computing():
            self._catch_up()
            room = max((len(row.prompt) + row.request.max_new_tokens for row in rows), default=0)
            self._cache.ensure(len(self._rows) + len(rows), room)
            for row in rows:
                row.scores = self._fill(len(self._rows), row.picture, row.request.image, row.prompt)[-1]
                row.held = list(row.prompt)
                self._rows.append(row)

    def prepare(self, request: Request) -> None:
        """Keep the head of the request's picture, without answering."""
        row = self._described(0, request, time.perf_counter())
        head = row.prompt[: self._backend.head_length(row.prompt)]
        with self._backend.computing():
            if self._backend.kept.longest(row.picture, head) < len(head):
                self._cache.ensure(len(self._rows) + 1, len(head))
                self._fill(len(self._rows), row.picture, request.image, head)
                self._backend.kept.keep(row.picture, head, self._cache.cut(len(self._rows), len(head)))

    def step(self) -> Items:
        """One more token for each request: the text that is known now, and the answers that are finished."""
        found: Items = []
        with self._backend.computing():
            self._catch_up()
            for row in list(self._rows):
                token, row.log_probability = self._chosen(row)
                now = time.perf_counter() - row.began
                row.first = row.first or now
                row.ids.append(token)
                row.scores = None
                ended = token in self._loaded.end_ids
                why = "stop" if ended else "length" if len(row.ids) >= row.request.max_new_tokens else ""
                if piece := row.text.add(token, final=bool(why)):
                    found.append(Token(row.number, piece))
                if why:
                    found.append((row.number, self._finish(row, now, why)))
        return found

    def drop(self, number: int) -> None:
        """Stop answering a request; one that is finished is no error."""
        for row in self._rows:
            if row.number == number:
                self._leave(row)
                return

    def close(self) -> None:
        """Stop everything and free the backend for another adapter. May be called twice."""
        if not self._closed:
            self._closed = True
            self._rows.clear()
            self._backend.leave()

    def _described(self, number: int, request: Request, began: float) -> _Row:
        ids, dropped = self._prompt(request)
        text = AnswerText(self._loaded.tokenizer)
        return _Row(number, request, digest(request.image), began, ids, dropped, text)

    def _prompt(self, request: Request) -> tuple[list[int], int]:
        """Token ids of a request, and how many of the oldest turns were left out because all would not fit."""
        loaded = self._loaded
        room = loaded.positions - request.max_new_tokens
        turns = [*request.history, (request.question, "")]
        for dropped in range(len(turns)):
            ids, _ = encode(loaded.tokenizer, loaded.template, turns[dropped:], loaded.image_tokens, None)
            if len(ids) <= room:
                return ids, dropped
        raise RequestRefused(f"The question is too long: {len(ids)} tokens, at most {room} fit; shorten it.")

    def _fill(self, line: int, picture: str, image: np.ndarray, ids: Sequence[int], wanted: int = 1) -> np.ndarray:
        """Put keys and values of `ids` into a free line; logits (wanted, vocabulary) after its last ids."""
        start = self._reused(line, picture, ids, len(ids) - wanted)
        rest = list(ids[start:])
        embedded = self._backend.embeddings.rows(rest)
        places = [place for place, token in enumerate(rest) if token == self._loaded.image_token_id]
        if places:  # the head is not kept whole: the last image tokens are missing
            embedded[places] = self._backend.features(image)[-len(places) :]
        scores = self._backend.decoder.run(embedded[None], self._cache, line, [start], wanted)[0]
        return np.asarray(scores)

    def _reused(self, line: int, picture: str, ids: Sequence[int], most: int) -> int:
        """Copy what is already computed of the same beginning, at most `most` positions; returns how many."""
        best, source = 0, -1
        for place, row in enumerate(self._rows):
            if row.picture == picture and (shared := min(common(row.held, ids), most)) > best:
                best, source = shared, place
        if self._keep and (shared := min(self._backend.kept.longest(picture, ids), most)) > best:
            self._cache.put(line, self._backend.kept.take(picture, ids), shared)
            return shared
        if best:
            self._cache.move(source, line, best)
        return best

    def _catch_up(self) -> None:
        """Run the tokens that were chosen but not run yet."""
        if not self._rows or self._rows[0].scores is not None:
            return
        room = max(len(row.held) for row in self._rows) + 1
        self._cache.ensure(len(self._rows), room)
        embedded = self._backend.embeddings.rows([row.ids[-1] for row in self._rows])[:, None]
        held = [len(row.held) for row in self._rows]
        scores = self._backend.decoder.run(embedded, self._cache, 0, held)
        for row, own in zip(self._rows, scores, strict=True):
            row.held.append(row.ids[-1])
            row.scores = own[-1]

    def _chosen(self, row: _Row) -> tuple[int, float]:
        """The likeliest allowed token and the log-probability of the answer with it."""
        logs = _log_softmax(row.scores, self._backend.never)
        token = int(logs.argmax())
        return token, row.log_probability + float(logs[token])

    def _leave(self, row: _Row) -> None:
        """Free a row's line: the last line moves there."""
        place = self._rows.index(row)
        last = self._rows.pop()
        if last is not row:
            self._cache.move(len(self._rows), place, len(last.held))
            self._rows[place] = last

    def _finish(self, row: _Row, seconds: float, why: str) -> Answer:
        loaded = self._loaded
        if self._keep:
            self._backend.kept.keep(row.picture, row.held, self._cache.cut(self._rows.index(row), len(row.held)))
        nats, mark, cost = self._reliance(row) if row.request.reliance else (None, None, 0.0)
        self._leave(row)
        return Answer(
            text=row.text.told,
            confidence=math.exp(row.log_probability),
            image_reliant=reliance.flag(mark),
            tokens=len(row.ids),
            seconds=seconds,
            first_token_seconds=row.first,
            peak_bytes=memory.stop("cpu"),
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

    def _reliance(self, row: _Row) -> tuple[float, str, float]:
        """Nats, mark and seconds of the pass with the picture blanked."""
        began = time.perf_counter()
        grey, line = reliance.blank(row.request.image), len(self._rows)
        name, ids = digest(grey), [*row.prompt, *row.ids[:-1]]
        self._cache.ensure(line + 1, len(ids))
        scores = self._fill(line, name, grey, ids, len(row.ids))
        if self._keep:
            head = ids[: self._backend.head_length(ids)]
            self._backend.kept.keep(name, head, self._cache.cut(line, len(head)))
        logs = (_log_softmax(own, self._backend.never)[token] for own, token in zip(scores, row.ids, strict=True))
        found = reliance.judge(row.log_probability - float(sum(logs)))
        return found.nats, found.mark, time.perf_counter() - began


def _log_softmax(scores: np.ndarray, never: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities (vocabulary); those of the ids `never` are minus infinity."""
    scores = scores.astype(np.float64)
    scores[never] = -np.inf
    scores -= scores.max()
    return np.asarray(scores - np.log(np.exp(scores).sum()))
