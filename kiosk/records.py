"""The rows of the case database as frozen dataclasses: Case, Turn, Consent and what lists and exports show of them.

Field names are the column names. Times are UTC, ISO 8601 with seconds and a final Z. Holds no logic of the database.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Self

VERDICTS = ("none", "confirmed", "corrected", "rejected")
CONSENTS = ("none", "care", "training")


def now() -> str:
    """This moment, UTC, as `2026-11-23T14:05:09Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class _Row:
    """Builds a dataclass from a database row, by column name; columns without a field are left out."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: row[name] for name in names if name in row})


@dataclass(frozen=True)
class NewImage:
    """A picture about to be stored: a PNG without metadata, and what is known about where it came from."""

    png: bytes
    format: str
    frame: int
    frames: int
    fields: Mapping[str, str | int | float]


@dataclass(frozen=True)
class Turn(_Row):
    """One question about a case with its answer, how it was made, and what a person said about it."""

    id: int
    case_id: int
    question: str
    asked_at: str
    asked_by: str
    status: str  # pending, answered, failed
    problem: str | None = None
    answer: str | None = None
    confidence: float | None = None
    first_token_seconds: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    backend: str | None = None
    reason: str | None = None
    bits: int | None = None
    device: str | None = None
    model_id: str | None = None
    base_sha256: str | None = None
    adapter_sha256: str | None = None
    adapter_name: str | None = None
    reliance: str | None = None  # a mark of model.reliance; None where it was not asked for
    reliance_nats: float | None = None
    verdict: str = "none"
    correction: str | None = None
    reviewed_by: str | None = None
    reviewed_at: str | None = None

    @property
    def final_answer(self) -> str:
        """The answer a person stands behind: the correction where there is one."""
        return (self.correction if self.verdict == "corrected" else self.answer) or ""


@dataclass(frozen=True)
class Consent(_Row):
    """One decision about one case. The latest row of a case counts; earlier ones stay as history.

    `looked`: the author also looked at the picture and saw no name written in it.
    """

    case_id: int
    state: str  # none, care, training
    looked: int
    author: str
    at: str


@dataclass(frozen=True)
class Case:
    """A picture with its turns and consents, both oldest first. The picture's bytes are read with `queries.image`."""

    id: int
    created_at: str
    author: str
    format: str
    frame: int
    frames: int
    fields: dict[str, str | int | float]
    image_sha256: str
    turns: tuple[Turn, ...]
    consents: tuple[Consent, ...]

    @property
    def consent(self) -> str:
        """The state that counts now: the latest, or "none" where nobody was asked."""
        return self.consents[-1].state if self.consents else "none"

    @staticmethod
    def of(row: Mapping[str, Any], turns: list[Turn], consents: list[Consent]) -> "Case":
        """Put together one case from its rows."""
        plain = {
            name: row[name] for name in ("id", "created_at", "author", "format", "frame", "frames", "image_sha256")
        }
        return Case(**plain, fields=json.loads(row["fields"]), turns=tuple(turns), consents=tuple(consents))


@dataclass(frozen=True)
class Trainable(_Row):
    """One reviewed turn of a case whose latest consent is "training": what the export may write."""

    turn_id: int
    case_id: int
    question: str
    answer: str
    image_sha256: str
    format: str
    fields: str
    consented_at: str
    looked: int
