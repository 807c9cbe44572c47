"""Turn a SentencePiece `tokenizer.model` into the tokenizer.json that fast tokenizers read, with no other library.

The file is a protocol-buffer message (sentencepiece_model.proto): field 1 repeats the pieces (1 text, 2 score, 3 type),
field 2 is the training setting (3 = model type). Only byte-pair models with byte fallback are taken, which is what
the Llama and Mistral families use. The result is written the way their published tokenizer.json files are: a space
mark before the text and for every space, no other normalization.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPACE = "▁"
_NORMAL, _CONTROL, _USER, _BPE = 1, 3, 4, 2
_UNKNOWN = 2
_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


class TokenizerUnreadable(RuntimeError):
    """A tokenizer file is damaged or of a kind that is not read; the message says which and what to do."""


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: int for varints, bytes for the other kinds."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if place + size > len(data):
            raise ValueError("the file ends too early")
        yield tag >> 3, data[place : place + size]
        place += size


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = value.decode("utf-8")
        elif number == 2:
            score = struct.unpack("<f", value)[0]
        elif number == 3:
            kind = value
    return text, score, kind


def read_pieces(path: Path) -> list[tuple[str, float, int]]:
    """(text, score, type) of every piece by id. Raises TokenizerUnreadable."""
    try:
        data = path.read_bytes()
        found = list(_fields(data))
        pieces = [_piece(value) for number, value in found if number == 1]
        trainer = [dict(_fields(value)) for number, value in found if number == 2]
    except (OSError, ValueError, IndexError, AttributeError, TypeError, struct.error) as error:
        raise TokenizerUnreadable(f"{path} is no readable SentencePiece model; copy it again ({error}).") from error
    if not pieces or not trainer:
        raise TokenizerUnreadable(f"{path} holds no SentencePiece vocabulary; copy it again.")
    if trainer[0].get(3, 1) != _BPE:
        raise TokenizerUnreadable(f"{path} is no byte-pair model; put the tokenizer.json of the model beside it.")
    return pieces


def merges(vocabulary: dict[str, int], rank: dict[str, float] | None = None) -> list[tuple[str, str]]:
    """Byte-pair merges of a vocabulary: every way to join two entries into a third, best score of the third first.

    `rank` gives the scores (higher is earlier); by default a smaller id is earlier.
    """
    found = []
    for text, number in vocabulary.items():
        score = -rank[text] if rank is not None else number
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def convert(path: Path, *, add_bos: bool = True, add_eos: bool = False) -> dict[str, Any]:
    """The content of a tokenizer.json for the SentencePiece model at `path`. Raises TokenizerUnreadable."""
    pieces = read_pieces(path)
    vocabulary = {text: number for number, (text, _, _) in enumerate(pieces)}
    joined = {text: n for n, (text, _, kind) in enumerate(pieces) if kind in (_NORMAL, _USER)}
    pairs = merges(joined, {text: score for text, score, _ in pieces})
    special = [n for n, (_, _, kind) in enumerate(pieces) if kind in (_CONTROL, _UNKNOWN)]
    unknown = next((text for text, _, kind in pieces if kind == _UNKNOWN), None)
    controls = [text for text, _, kind in pieces if kind == _CONTROL]
    bos = "<s>" if add_bos and "<s>" in controls else None
    eos = "</s>" if add_eos and "</s>" in controls else None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(n, pieces[n][0]) for n in special],
        "normalizer": _NORMALIZER,
        "pre_tokenizer": None,
        "post_processor": _frame(bos, eos, vocabulary),
        "decoder": _DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [f"{left} {right}" for left, right in pairs],
        },
    }


def _added(number: int, text: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": text, **flags}


def _frame(bos: str | None, eos: str | None, vocabulary: dict[str, int]) -> dict[str, Any] | None:
    """What is put around a text: the marks for its beginning and end, where they are wanted."""
    if bos is None and eos is None:
        return None

    def around(sequence: str, kind: int) -> list[dict[str, Any]]:
        text = [{"Sequence": {"id": sequence, "type_id": kind}}]
        before = [{"SpecialToken": {"id": bos, "type_id": kind}}] if bos else []
        after = [{"SpecialToken": {"id": eos, "type_id": kind}}] if eos else []
        return before + text + after

    marks = {m: {"id": m, "ids": [vocabulary[m]], "tokens": [m]} for m in (bos, eos) if m}
    pair = around("A", 0) + around("B", 1)
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": marks}
