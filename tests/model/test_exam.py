"""An examination: the bare model, what is installed and the candidate answer the same rows; only counts come out."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model import exam
from model.backends import Request
from model.data import Sample


class Knowing:
    """A small real backend: it knows the answers of as many pictures (by brightness) as its adapter's name says."""

    def __init__(self, mark: str | None = "image-reliant") -> None:
        self.known, self.mark = 0, mark
        self.swaps: list[str] = []
        self.pictures = 0

    def swap_adapter(self, folder: Path | None) -> None:
        self.known = int(folder.name) if folder else 0
        self.swaps.append(folder.name if folder else "base")

    def generate(self, requests: Sequence[Request]) -> Iterator[Any]:
        assert all(request.reliance for request in requests)
        for index, request in enumerate(requests):
            self.pictures += 1
            right = request.image[0, 0, 0] < self.known
            said = SimpleNamespace(text="Yes." if right else "no", confidence=0.9, reliance=self.mark if right else "")
            if self.mark:
                said.reliance = self.mark if right else "unsure"
            yield SimpleNamespace(index=index, text=said.text)
            yield index, said


def samples(pictures: int = 12, questions: int = 3) -> list[Sample]:
    return [
        Sample(f"{n}-{q}", np.full((4, 4, 3), n, np.uint8), f"Is it {q}?", "yes", "closed", f"p{n}", "test")
        for n in range(pictures)
        for q in range(questions)
    ]


def test_three_sets_of_answers_become_counts() -> None:
    backend = Knowing()
    found = exam.compare(backend, samples(), Path("/x/4"), Path("/x/6"), bits=4)
    assert backend.swaps == ["base", "4", "6"]
    assert (found.rows, found.groups, found.squares, found.bits) == (36, 12, 12 * 9, 4)
    assert (found.installed.before, found.installed.after) == (12, 18)
    assert (found.installed.lost, found.installed.gained) == (0, 6)
    assert (found.base.before, found.base.after) == (0, 18)
    assert found.reliance is not None and (found.reliance.before, found.reliance.after) == (12, 18)
    assert found.seen == found.reliance
    assert sum(found.after[0]) == 36 and sum(found.after[1]) == 18


def test_without_an_installed_adapter_the_bare_model_is_asked_once() -> None:
    backend = Knowing()
    found = exam.compare(backend, samples(), None, Path("/x/6"), bits=8)
    assert backend.swaps == ["base", "6"] and found.installed == found.base and backend.pictures == 72


def test_a_backend_that_cannot_hide_the_picture_gives_no_reliance() -> None:
    found = exam.compare(Knowing(None), samples(), None, Path("/x/6"), bits=4)
    assert found.reliance is None and found.seen is None


def test_an_examination_ends_with_its_time() -> None:
    with pytest.raises(exam.ExamTooLong):
        exam.compare(Knowing(), samples(), None, Path("/x/6"), bits=4, end=time.monotonic() - 1)
