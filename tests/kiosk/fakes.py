"""A small real backend: it answers from the picture's own brightness, word by word, and takes adapters like the others.

Not a mock: every answer depends on the pixels and the question. `gate`, when given, holds the answer back until it is
set, so that a test decides when the model is at work.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from model.adapters import AdapterRejected
from model.backends import Answer, Request, Token


class BrightnessBackend:
    """Says "bright" or "dark"; an adapter (a folder with words.json) may bring other words."""

    name = "brightness"
    reason = "it needs no weights"

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.gate = gate
        self.words = ("dark", "bright")
        self.adapter_sha256: str | None = None
        self.asked: list[Request] = []

    def swap_adapter(self, folder: Path | None) -> None:
        if folder is None:
            self.words, self.adapter_sha256 = ("dark", "bright"), None
            return
        if not (folder / "words.json").is_file():
            raise AdapterRejected(f"{folder.name} was made for another model.")
        self.words, self.adapter_sha256 = tuple(json.loads((folder / "words.json").read_text())), "b" * 64

    def generate(self, requests: Sequence[Request]) -> Iterator[Token | tuple[int, Answer]]:
        for index, request in enumerate(requests):
            self.asked.append(request)
            pieces = ["It ", "is ", self.words[int(np.mean(request.image) > 127)]]
            yield Token(index, pieces[0])
            if self.gate:
                self.gate.wait(20)
            for piece in pieces[1:]:
                yield Token(index, piece)
            yield index, self.answer("".join(pieces), len(pieces))

    def answer(self, text: str, tokens: int) -> Answer:
        return Answer(
            text=text,
            confidence=0.83,
            image_reliant=None,
            tokens=tokens,
            seconds=0.5,
            first_token_seconds=0.1,
            peak_bytes=12_000_000,
            backend=self.name,
            reason=self.reason,
            bits=4,
            device="cpu",
            model_id="brightness",
            base_sha256="a" * 64,
            adapter_sha256=self.adapter_sha256,
            finish_reason="stop",
        )


def answer(text: str = "It is bright") -> Answer:
    """A finished answer to save without asking anything."""
    return BrightnessBackend().answer(text, 3)
