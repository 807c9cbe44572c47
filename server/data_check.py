"""Faults of LLaVA training files, found before any GPU hour is spent.

Errors would break or waste training: rows that cannot be read, empty answers, missing or unreadable pictures, rows of
which nothing is left to learn. Warnings are worth a look: rows longer than the model takes, duplicates, contradictions,
pictures that training and test share (by name, or by their pixels under another name).
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model.conversations import Conversation, read_conversations

ERRORS = ("row", "empty answer", "missing image", "unreadable image", "nothing to learn")
_EXAMPLES = 5
Length = Callable[[Conversation], tuple[int, bool]]  # tokens of a row, and whether a label is left after the cut
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]  # (items, how many, what) -> the same items, shown


@dataclass
class Fault:
    """One kind of fault: how many rows (or pictures), and at most five examples with file and row number."""

    kind: str
    error: bool
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(example)


@dataclass
class CheckReport:
    """What was checked (rows by file, different pictures) and every kind of fault that was found."""

    rows: dict[str, int] = field(default_factory=dict)
    images: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Count one fault of a kind."""
        self.faults.setdefault(kind, Fault(kind, kind in ERRORS)).add(example)

    @property
    def errors(self) -> int:
        """Faults that would break training."""
        return sum(fault.count for fault in self.faults.values() if fault.error)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        faults = [asdict(fault) for fault in self.faults.values()]
        return {"rows": self.rows, "images": self.images, "errors": self.errors, "notes": self.notes, "faults": faults}

    def table(self) -> str:
        """The report for people."""
        lines = [f"{name}: {count} usable rows" for name, count in self.rows.items()]
        lines.append(f"{self.images} different pictures")
        lines += [f"note: {what}: {count}" for what, count in self.notes.items()]
        for fault in sorted(self.faults.values(), key=lambda f: not f.error):
            lines.append(f"{'ERROR' if fault.error else 'warning'}: {fault.kind}: {fault.count}")
            lines += [f"    {example}" for example in fault.examples]
        return "\n".join([*lines, "Nothing that would break training." if not self.errors else "Training would break."])


def _silent(items: Iterable[Any], _count: int, _what: str) -> Iterable[Any]:
    return items


def check(
    paths: Sequence[Path],
    images: Path,
    *,
    test: Sequence[Path] = (),
    length: Length | None = None,
    max_length: int = 2048,
    workers: int = 1,
    progress: Progress = _silent,
) -> CheckReport:
    """Check training files, and `test` files against them. `length` (see `lengths`) measures rows against `max_length`.

    Raises DataError only for a file that is no JSON list; everything else is a fault in the report.
    """
    report = CheckReport()
    train = _read(paths, images, report)
    held = _read(test, images, report)
    hashes = _pictures([*train, *held], images, report, workers, progress)
    _duplicates(train, report)
    if test:
        _overlap(train, held, hashes, images, report)
    if length is not None:
        for where, row in progress(train, len(train), "tokens"):
            tokens, left = length(row)
            if not left:
                report.add("nothing to learn", f"{where}: every answer lies behind token {max_length} of {tokens}")
            elif tokens > max_length:
                report.add("over-long", f"{where}: {tokens} tokens, cut to {max_length}")
    return report


Rows = list[tuple[str, Conversation]]  # (file and row number, row)


def _read(paths: Sequence[Path], images: Path, report: CheckReport) -> Rows:
    rows: Rows = []
    for path in paths:
        kept, found = read_conversations(path, images)
        report.rows[str(path)] = len(kept)
        for fault in found.faults:
            kind = "empty answer" if fault.kind == "empty answer" else "row"
            report.add(kind, f"{path.name} row {fault.row}: {fault.text}")
        for what, count in found.notes.items():
            report.notes[what] = report.notes.get(what, 0) + count
        rows += [(f"{path.name} row {row.row}", row) for row in kept]
    return rows


def _pictures(rows: Rows, images: Path, report: CheckReport, workers: int, progress: Progress) -> dict[str, str]:
    """Open every picture once; returns the hash of its pixels by path. A bad one is one fault, with its first row."""
    users: dict[str, list[str]] = {}
    for where, row in rows:
        if row.image is not None:
            users.setdefault(row.image, []).append(where)
    report.images = len(users)
    hashes = {}
    for path, fault, digest in progress(_examined(list(users), workers), len(users), "images"):
        hashes[path] = digest
        if fault:
            kind = "missing image" if fault == "missing" else "unreadable image"
            detail = "" if fault == "missing" else f": {fault}"
            report.add(kind, f"{_name(path, images)} ({len(users[path])} rows, first {users[path][0]}){detail}")
    return hashes


def _examined(paths: list[str], workers: int) -> Iterable[tuple[str, str, str]]:
    """(path, fault, hash) of each picture, opened in `workers` processes when that is worth starting them."""
    if workers < 2 or len(paths) < 200:
        yield from map(_one, paths)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_one, paths, chunksize=32)


def _one(path: str) -> tuple[str, str, str]:
    from model.data import examine

    return path, *examine(path)


def _name(path: str, images: Path) -> str:
    prefix = f"{images}/"
    return path[len(prefix) :] if path.startswith(prefix) else path


def _duplicates(rows: Rows, report: CheckReport) -> None:
    """The same conversation twice, and the same question about the same picture with another answer."""
    seen: dict[int, str] = {}
    answers: dict[int, tuple[str, str]] = {}
    for where, row in rows:
        whole = hash((row.image, row.pairs))  # 64 bits: half a million rows collide once in a hundred million runs
        if whole in seen:
            report.add("duplicate", f"{where} repeats {seen[whole]}")
            continue
        seen[whole] = where
        question, answer = row.pairs[0]
        asked = hash((row.image, question.lower()))
        first = answers.setdefault(asked, (answer, where))
        if row.image is not None and first[0].lower() != answer.lower():
            report.add("contradiction", f"{where}: {question!r} is {answer!r}, in {first[1]} it is {first[0]!r}")


def _overlap(train: Rows, held: Rows, hashes: dict[str, str], images: Path, report: CheckReport) -> None:
    """Pictures of the test rows that training rows show, too."""
    names = {row.image for _, row in train}
    pixels: dict[str, str] = {}
    for name in names:
        if name is not None and hashes[name]:
            pixels[hashes[name]] = name
    for name in dict.fromkeys(row.image for _, row in held):
        if name is None:
            continue
        if name in names:
            report.add("in train and test", _name(name, images))
        elif hashes[name] and hashes[name] in pixels:
            twin = _name(pixels[hashes[name]], images)
            report.add("in train and test under another name", f"{_name(name, images)} is {twin}")


def lengths(model: Path, max_length: int) -> Length:
    """A function that counts a row's tokens as the model in folder `model` sees them. Raises ModelError.

    Short rows are not tokenized: a token is at least one byte, so a row of few bytes cannot be too long.
    """
    from model.llava import ModelError
    from model.prompts import IGNORE, encode_conversation, template_of

    tokenizer, image_tokens = _tokenizer(model)
    template = template_of(model)
    frame = len(encode_conversation(tokenizer, template, [("a", "a")], 0)[0]) + 16
    if image_tokens + frame >= max_length:
        raise ModelError(f"A picture of {model} takes {image_tokens} tokens; give a larger --max-length.")

    def length(row: Conversation) -> tuple[int, bool]:
        picture = image_tokens if row.image is not None else 0
        most = picture + sum(len(q.encode()) + len(a.encode()) + frame for q, a in row.pairs)
        if most <= max_length:
            return most, True
        ids, labels = encode_conversation(tokenizer, template, row.pairs, picture)
        return len(ids), any(label != IGNORE for label in labels[:max_length])

    return length


def _tokenizer(model: Path) -> tuple[Any, int]:
    """The tokenizer of a model folder and its number of picture positions. Raises ModelError."""
    from model.llava import ModelError, prepare_environment

    prepare_environment()
    from transformers import AutoProcessor

    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        tokenizer = AutoProcessor.from_pretrained(model, local_files_only=True, backend="pil").tokenizer
        return tokenizer, int(config["image_seq_length"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{model} is no model folder with a processor ({error}); import the model first.") from error
