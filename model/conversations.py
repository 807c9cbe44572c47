"""Reader of LLaVA conversation JSON for training: every spelling in the wild, bad rows set aside with their numbers.

A row is `{id, image?, conversations: [{from: human|gpt, value}], answer_type?, domain?}`. Read with its known quirks:
the key `conversatons`, numbers as values, a leading answer, several `<image>` marks or one anywhere in the text (the
prompt's template puts the picture first). No image file is touched here; `server.data_check` opens them.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.rows import DataError, answer_type, load_list

MARK = "<image>"
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class TurnFault(DataError):
    """A conversation that cannot be trained on; `kind` is what `Report` counts it under."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row to train on.

    `image` is the picture's path, already joined to the images folder, or None for a row without one. `pairs` are the
    (question, answer) turns without `<image>` marks. `answer_type` is open, closed or unknown; `domain` is a word, or
    several joined by "+". `row` counts from 0 in the file.
    """

    id: str
    image: str | None
    pairs: tuple[tuple[str, str], ...]
    answer_type: str
    domain: str
    row: int


@dataclass(frozen=True, slots=True)
class RowFault:
    """Why one row was left out: its number from 0, a short kind to count by, and a sentence."""

    row: int
    kind: str
    text: str


@dataclass
class Report:
    """What a file held: rows in all and kept, the faults of those left out, counts of quirks that were read past."""

    path: Path
    rows: int = 0
    kept: int = 0
    faults: list[RowFault] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def counts(self) -> Counter[str]:
        """Rows left out, by kind."""
        return Counter(fault.kind for fault in self.faults)

    def sentence(self) -> str:
        """The report in one line, with the first bad row of each kind."""
        text = f"{self.path}: {self.kept} of {self.rows} rows read"
        first = {fault.kind: fault.row for fault in reversed(self.faults)}
        parts = [f"{count} {kind} (first: row {first[kind]})" for kind, count in self.counts().most_common()]
        return f"{text}; left out: {', '.join(parts)}." if parts else f"{text}."


def turns_of(row: dict[str, Any]) -> list[Any]:
    """The turns of a row under either spelling of the key. Raises `TurnFault`."""
    turns = row.get("conversations") or row.get("conversatons")
    if not isinstance(turns, list):
        raise TurnFault("no conversation", "has no 'conversations' list; complete or remove the row.")
    return turns


def pairs_of(turns: Sequence[Any], notes: Counter[str] | None = None) -> tuple[tuple[str, str], ...]:
    """Question and answer pairs of one conversation, `<image>` marks removed. Raises `TurnFault`.

    Leading answers and a last question without an answer are dropped; otherwise the roles have to alternate. An empty
    answer is let through: whether one may be trained on or scored is the caller's to say. `notes` counts the quirks.
    """
    said: list[str] = []
    marks = 0
    for number, turn in enumerate(turns):
        role, value = _turn(turn, number)
        if role == "gpt" and not said:
            _note(notes, "leading answer dropped")
            continue
        if (role == "human") != (len(said) % 2 == 0):
            raise TurnFault("roles", f"turn {number} is a second {role} turn in a row; roles have to alternate.")
        if MARK in value:
            marks += value.count(MARK)
            value = value.replace(MARK, "")
        said.append(value.strip())
    if len(said) % 2:
        said.pop()
        _note(notes, "last question without answer dropped")
    if not said:
        raise TurnFault("no answer", "has no question with an answer; complete or remove the row.")
    if marks > 1:
        _note(notes, "several <image> marks")
    return tuple(zip(said[::2], said[1::2], strict=True))


def _turn(turn: Any, number: int) -> tuple[str, str]:
    """Role and text of one turn; numbers are text too."""
    if not isinstance(turn, dict):
        raise TurnFault("turn", f"turn {number} is not an object with 'from' and 'value'.")
    role = _ROLES.get(str(turn.get("from")).lower())
    if role is None:
        raise TurnFault("roles", f"turn {number} is from {turn.get('from')!r}; only human and gpt take turns.")
    value = turn.get("value")
    if isinstance(value, str):
        return role, value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return role, str(value)
    raise TurnFault("turn", f"turn {number} has no text under 'value'.")


def _note(notes: Counter[str] | None, what: str) -> None:
    if notes is not None:
        notes[what] += 1


def read_conversations(path: Path, images: Path | None = None) -> tuple[list[Conversation], Report]:
    """All usable rows of a LLaVA JSON or JSONL file, and a report on the others; `images` holds the pictures.

    Without `images` a row's `image` stays as the file has it. Raises `DataError` only when the file is no JSON list.
    """
    rows = load_list(path)
    report = Report(path, rows=len(rows))
    kept: list[Conversation] = []
    base = "" if images is None else str(images)
    for number in range(len(rows)):
        row, rows[number] = rows[number], None  # let go of the raw row: a large file need not be in memory twice
        try:
            kept.append(_conversation(row, number, base, report.notes))
        except TurnFault as fault:
            report.faults.append(RowFault(number, fault.kind, str(fault)))
    report.kept = len(kept)
    return kept, report


def _conversation(row: Any, number: int, base: str, notes: Counter[str]) -> Conversation:
    if not isinstance(row, dict):
        raise TurnFault("not an object", "is not a JSON object; remove it.")
    if "conversations" not in row and "conversatons" in row:
        notes["key conversatons"] += 1
    pairs = pairs_of(turns := turns_of(row), notes)
    if not all(answer for _, answer in pairs):
        raise TurnFault("empty answer", "has an empty answer; complete or remove the row.")
    image = _image(row, turns, notes)
    if image is None and not all(question for question, _ in pairs):
        raise TurnFault("empty question", "has neither an image nor a question; complete or remove the row.")
    kind = answer_type(row.get("answer_type"))
    if kind == "unknown" and row.get("answer_type"):
        notes["unknown answer_type"] += 1
    name = None if image is None else os.path.join(base, image)
    return Conversation(_id(row, number), name, pairs, kind, domain_of(row.get("domain")), number)


def _id(row: dict[str, Any], number: int) -> str:
    given = row.get("id")
    return str(number if given is None or given == "" else given)


def _image(row: dict[str, Any], turns: Sequence[Any], notes: Counter[str]) -> str | None:
    """The image name of a row, or None. A mark without a name is a fault; a name without a mark is only noted."""
    image = row.get("image")
    marked = any(MARK in str(turn.get("value")) for turn in turns)
    if image is None or image == "":
        if marked:
            raise TurnFault("no image name", f"has {MARK} in its text but names no image; add 'image' or remove it.")
        notes["without image"] += 1
        return None
    if not isinstance(image, str) or "\0" in image:
        raise TurnFault("image name", "has an 'image' that is not one file name; give one name or remove the row.")
    if not marked:
        notes[f"image without {MARK} in the text"] += 1
    return image


def domain_of(value: Any) -> str:
    """A domain as one word: a string as it is, `{name: true, ...}` as its true names joined by "+"."""
    if isinstance(value, dict):
        return "+".join(str(name) for name, true in value.items() if true)
    if isinstance(value, list):
        return "+".join(str(name) for name in value)
    return "" if value is None else str(value)
