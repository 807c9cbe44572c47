"""Several doctors at one model: together, each with a stream of its own, stopped, refused when it is too much."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiosk import inference, queries
from kiosk.inference import AnswerFailed, Engine, Job
from kiosk.settings import Settings
from kiosk.store import CaseStore
from model.backends import Answer, Request, TorchBackend
from model.batching import TorchBatch
from tests.kiosk.conftest import picture
from tests.kiosk.fakes import BrightnessBackend

PICTURES = [np.random.default_rng(n).integers(0, 256, (40, 50, 3), dtype=np.uint8) for n in range(3)]
REQUESTS = [Request(PICTURES[n % 3], f"Is there a nodule? {n}", (), 9 + n) for n in range(8)]


def submit(store: CaseStore, engine: Engine, request: Request) -> Job:
    _, turn_id = store.add_case(picture(), "NA", request.question)
    return engine.submit(turn_id, request)


def alone(backend: TorchBackend, request: Request) -> Answer:
    return next(item[1] for item in backend.generate([request]) if isinstance(item, tuple))


@pytest.fixture(scope="module")
def backend(tiny: Path) -> TorchBackend:
    return TorchBackend(tiny, 32, device="cpu")


class Loading:
    """A factory that waits until the questions are all there, so that they meet in one batch."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.go = backend, threading.Event()

    def __call__(self) -> Any:
        assert self.go.wait(20)
        return self.backend


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many questions were answered together, at each token."""
    seen: list[int] = []
    plain = TorchBatch.step

    def noting(self: TorchBatch) -> Any:
        seen.append(len(self.active))
        return plain(self)

    monkeypatch.setattr(TorchBatch, "step", noting)
    return seen


@pytest.fixture(params=[1, 8])
def joins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many join between two tokens: as on a CPU, and as on a GPU."""
    plain = TorchBackend.open_batch

    def opened(self: TorchBackend, keep: bool = True) -> TorchBatch:
        batch = plain(self, keep)
        batch.joins = request.param
        return batch

    monkeypatch.setattr(TorchBackend, "open_batch", opened)
    return int(request.param)


def test_eight_people_are_answered_together_each_as_if_alone(
    store: CaseStore, afya_home: Path, backend: TorchBackend, widths: list[int], joins: int
) -> None:
    factory = Loading(backend)
    engine = Engine(store, afya_home, Settings(), factory)
    jobs = [submit(store, engine, request) for request in REQUESTS]
    reading = engine.stream(jobs[0])  # begun and left: a reader that is slow holds nobody up
    told: dict[int, str] = {}
    readers = [
        threading.Thread(target=lambda j=job: told.update({j.turn_id: "".join(engine.stream(j))})) for job in jobs[1:]
    ]
    for reader in readers:
        reader.start()
    factory.go.set()
    for reader in readers:
        reader.join(60)
    assert max(widths) > 4 and (joins == 1 or widths[1] == 8)
    assert "".join(reading) == queries.turn(store, jobs[0].turn_id).answer
    engine.stop()
    for job, request in zip(jobs, REQUESTS, strict=True):
        turn, expected = queries.turn(store, job.turn_id), alone(backend, request)
        assert (turn.status, turn.answer, turn.tokens) == ("answered", expected.text, expected.tokens)
        assert turn.confidence == pytest.approx(expected.confidence, rel=1e-4)
        assert told.get(job.turn_id, expected.text) == expected.text


def test_a_question_is_stopped_and_the_others_go_on(
    store: CaseStore, afya_home: Path, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory, plain = Loading(backend), TorchBatch.step
    engine = Engine(store, afya_home, Settings(), factory)
    jobs = [submit(store, engine, request) for request in REQUESTS[:4]]

    def stopping(self: TorchBatch) -> Any:
        found = plain(self)
        engine.cancel(jobs[1].turn_id)
        return found

    monkeypatch.setattr(TorchBatch, "step", stopping)
    engine.cancel(jobs[2].turn_id)  # still waiting
    factory.go.set()
    engine.stop()
    assert [queries.turn(store, job.turn_id).status for job in jobs] == ["answered", "failed", "failed", "answered"]
    with pytest.raises(AnswerFailed, match="stopped before it was answered"):
        list(engine.stream(jobs[1]))
    engine.cancel(jobs[0].turn_id)
    assert queries.turn(store, jobs[0].turn_id).status == "answered", "too late changes nothing"


def test_a_full_queue_says_that_the_computer_is_busy(
    store: CaseStore, afya_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_WAITING", 2)
    factory = Loading(BrightnessBackend())
    engine = Engine(store, afya_home, Settings(), factory)
    bright = Request(np.full((8, 8, 3), 200, np.uint8), "Is it bright?")
    jobs = [submit(store, engine, bright) for _ in range(3)]
    with pytest.raises(AnswerFailed, match="busy: 2 questions are waiting; please ask again"):
        list(engine.stream(jobs[2]))
    assert "busy" in (queries.turn(store, jobs[2].turn_id).problem or "") and engine.job(jobs[2].turn_id) is None
    factory.go.set()
    assert "".join(engine.stream(jobs[1])) == "It is bright"
    store.retry_turn(jobs[2].turn_id)
    assert "".join(engine.stream(engine.submit(jobs[2].turn_id, bright))) == "It is bright"
    engine.stop()


def test_a_question_that_cannot_be_answered_hurts_nobody(
    store: CaseStore, afya_home: Path, backend: TorchBackend, joins: int
) -> None:
    factory = Loading(backend)
    engine = Engine(store, afya_home, Settings(), factory)
    bad = replace(REQUESTS[0], question="what " * 600)
    jobs = [submit(store, engine, request) for request in (REQUESTS[0], bad, REQUESTS[1])]
    factory.go.set()
    engine.stop()
    turns = [queries.turn(store, job.turn_id) for job in jobs]
    assert [turn.status for turn in turns] == ["answered", "failed", "answered"]
    assert "too long" in (turns[1].problem or "")


def test_a_batch_that_breaks_down_is_begun_again_one_by_one(
    store: CaseStore, afya_home: Path, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second token of four rows needs more memory than there is, and so does one question even alone."""
    plain, steps = TorchBatch.step, [0]

    def narrow(self: TorchBatch) -> Any:
        steps[0] += 1
        if (steps[0] > 1 and len(self.active) > 1) or (jobs[2].turn_id in self.active and jobs[2].alone):
            raise MemoryError("no memory left")
        return plain(self)

    monkeypatch.setattr(TorchBatch, "step", narrow)
    factory = Loading(backend)
    engine = Engine(store, afya_home, Settings(), factory)
    jobs = [submit(store, engine, request) for request in REQUESTS[:4]]
    factory.go.set()
    engine.stop()
    monkeypatch.undo()
    for number, job in enumerate(jobs):
        turn = queries.turn(store, job.turn_id)
        if number == 2:
            assert turn.status == "failed" and "no memory left" in (turn.problem or "")
        else:
            assert turn.answer == alone(backend, REQUESTS[number]).text == "".join(engine.stream(job))


def test_a_chosen_picture_is_looked_at_while_the_question_is_typed(
    store: CaseStore, afya_home: Path, tiny: Path
) -> None:
    backend = TorchBackend(tiny, 32, device="cpu")
    engine = Engine(store, afya_home, Settings(), lambda: backend)
    engine.prepare(PICTURES[0])
    engine.prepare(np.zeros((3, 3), np.uint8))  # no picture at all: told in the log, nothing stops
    job = submit(store, engine, REQUESTS[0])
    assert "".join(engine.stream(job)) == alone(backend, REQUESTS[0]).text
    engine.prepare(PICTURES[1])
    engine.stop()
    assert len(backend.kept) >= 1


class Refusing(BrightnessBackend):
    """Has no batches of its own, and refuses dark pictures."""

    def generate(self, requests: Sequence[Request]) -> Any:
        if requests[0].image.mean() < 50:
            raise MemoryError("no memory left")
        yield from super().generate(requests)


def test_a_backend_without_batches_answers_one_after_another(store: CaseStore, afya_home: Path) -> None:
    factory = Loading(Refusing())
    engine = Engine(store, afya_home, Settings(), factory)
    light, dark = (Request(np.full((8, 8, 3), value, np.uint8), "Is it bright?") for value in (200, 0))
    jobs = [submit(store, engine, request) for request in (light, dark, light)]
    assert [job.ahead for job in jobs] == [0, 1, 2]
    factory.go.set()
    engine.stop()
    assert [queries.turn(store, job.turn_id).status for job in jobs] == ["answered", "failed", "answered"]
