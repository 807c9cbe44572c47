"""Rows that join and leave while others are answered, conversations from kept keys and values, reliance on the way."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model import decode, reliance
from model.backends import Answer, Request, RequestRefused, Token, TorchBackend
from model.batching import Serial, open_batch
from tests.model.lora import random_adapter

PICTURES = [np.random.default_rng(n).integers(0, 256, (40 + 9 * n, 50, 3), dtype=np.uint8) for n in range(3)]
QUESTIONS = ["Is there a nodule?", "What modality is used to take this image, and where?", "left"]
REQUESTS = [Request(PICTURES[n % 3], QUESTIONS[n % 2], max_new_tokens=3 + n % 4) for n in range(8)]


@pytest.fixture(scope="module")
def cold(tiny: Path) -> TorchBackend:
    """Keeps nothing: what every answer must be equal to."""
    return TorchBackend(tiny, 32, device="cpu", keep_bytes=0)


@pytest.fixture
def warm(cold: TorchBackend) -> TorchBackend:
    return TorchBackend.wrap(cold.loaded, keep_bytes=2**20)


def alone(backend: TorchBackend, request: Request) -> Answer:
    return next(item[1] for item in backend.generate([request]) if isinstance(item, tuple))


def same(a: Answer, b: Answer) -> None:
    assert (a.text, a.tokens, a.finish_reason) == (b.text, b.tokens, b.finish_reason)
    assert a.confidence == pytest.approx(b.confidence, rel=1e-5, abs=0)


def conversation(backend: TorchBackend, turns: int = 4) -> list[tuple[Request, Answer]]:
    found: list[tuple[Request, Answer]] = []
    history: tuple[tuple[str, str], ...] = ()
    for number in range(turns):
        request = Request(PICTURES[0], QUESTIONS[number % 3], history, 6)
        found.append((request, alone(backend, request)))
        history = (*history, (request.question, found[-1][1].text))
    return found


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that go through the decoder, one entry for each run."""
    seen: list[int] = []
    plain = decode.states

    def noting(core: object, embedded: np.ndarray, *rest: object) -> object:
        seen.append(embedded.shape[0] * embedded.shape[1])
        return plain(core, embedded, *rest)

    monkeypatch.setattr(decode, "states", noting)
    return seen


def test_a_conversation_answers_the_same_and_computes_only_its_new_tokens(
    cold: TorchBackend, warm: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counted(monkeypatch)
    talked = conversation(warm)
    kept = sum(seen)
    seen.clear()
    for request, answer in talked:
        same(alone(cold, request), answer)
    assert kept < 0.6 * sum(seen)
    seen.clear()
    alone(warm, talked[-1][0])
    assert seen[0] == 1, "the same question again: all but the last token of its prompt is kept"


def test_a_prepared_picture_is_not_computed_again(
    cold: TorchBackend, warm: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm.prepare(PICTURES[1])
    monkeypatch.setattr(decode, "encode_pictures", None)
    warm.prepare(PICTURES[1].copy())
    answer = alone(warm, REQUESTS[1])
    monkeypatch.undo()
    same(answer, alone(cold, REQUESTS[1]))


def test_another_picture_with_the_same_question_is_another_answer(cold: TorchBackend, warm: TorchBackend) -> None:
    for picture in (*PICTURES, *PICTURES):
        request = replace(REQUESTS[0], image=picture)
        same(alone(warm, request), alone(cold, request))


def test_an_adapter_makes_what_was_kept_worthless(tiny: Path, tmp_path: Path, cold: TorchBackend) -> None:
    backend = TorchBackend(tiny, 32, device="cpu")
    before = alone(backend, REQUESTS[0])
    folder = random_adapter(tiny, tmp_path / "adapter")
    backend.swap_adapter(folder)
    same(alone(backend, REQUESTS[0]), alone(TorchBackend(tiny, 32, folder, "cpu"), REQUESTS[0]))
    backend.swap_adapter(None)
    same(alone(backend, REQUESTS[0]), before)


@pytest.mark.parametrize("bits", [32, 4])
def test_eight_join_one_after_another_and_answer_as_if_alone(tiny: Path, bits: int) -> None:
    backend = TorchBackend(tiny, bits, device="cpu")
    told, done = [""] * len(REQUESTS), {}
    batch = backend.open_batch()
    waiting = list(enumerate(REQUESTS))
    while waiting or batch.active:
        if waiting:
            batch.add([waiting.pop(0)])
        for item in batch.step():
            if isinstance(item, Token):
                told[item.index] += item.text
            else:
                done[item[0]] = item[1]
    batch.close()
    for number, request in enumerate(REQUESTS):
        single = alone(backend, request)
        assert told[number] == done[number].text == single.text
        tolerance = 1e-5 if bits == 32 else 0.05
        assert done[number].confidence == pytest.approx(single.confidence, rel=tolerance, abs=0)


def test_a_row_that_leaves_changes_nothing_for_the_others(cold: TorchBackend) -> None:
    batch = cold.open_batch()
    batch.add(list(enumerate(REQUESTS[:4])))
    found = dict(item for item in batch.step() if isinstance(item, tuple))
    batch.drop(1)
    batch.drop(1)
    while batch.active:
        found |= dict(item for item in batch.step() if isinstance(item, tuple))
    batch.close()
    assert sorted(found) == [0, 2, 3]
    for number in found:
        same(found[number], alone(cold, REQUESTS[number]))


def test_a_refused_request_hurts_nobody(cold: TorchBackend) -> None:
    batch = cold.open_batch()
    batch.add([(0, REQUESTS[0])])
    for bad in (Request(PICTURES[0], " "), Request(PICTURES[0], "what " * 600)):
        with pytest.raises(RequestRefused):
            batch.add([(1, bad)])
    found: dict[int, Answer] = {}
    while batch.active:
        found |= dict(item for item in batch.step() if isinstance(item, tuple))
    batch.close()
    same(found[0], alone(cold, REQUESTS[0]))


def test_reliance_is_the_drop_of_the_log_probability(cold: TorchBackend, warm: TorchBackend) -> None:
    """Reference: the pass over the whole prompt, without anything kept."""
    request = replace(REQUESTS[1], reliance=True)
    for backend in (cold, warm, warm):
        answer = alone(backend, request)
        core, processor = backend.loaded.core, backend.loaded.processor
        grey = reliance.blank(request.image)
        prompt, _ = backend.open_batch()._prompt(request, core.config.image_seq_length)
        backend.leave()
        ids: list[int] = []
        rows = decode.Batch(core, backend.banned_ids())
        features, _ = decode.encode_pictures(core, processor, [request.image])
        head = prompt[: decode.head_length(core, prompt)]
        rows.join([decode.Row(0, prompt, request.max_new_tokens, decode.heads(core, features, head))])
        while rows.rows:
            ids += [step.token for step in rows.step()]
        without = reliance.log_probabilities(core, processor, [grey], [prompt], [ids], backend.banned_ids())[0]
        assert answer.reliance_nats == pytest.approx(math.log(answer.confidence) - without, abs=1e-4)
        assert answer.reliance == reliance.judge(answer.reliance_nats or 0.0).mark
        assert answer.image_reliant is reliance.flag(answer.reliance) and answer.reliance_seconds > 0
    plain = alone(cold, REQUESTS[1])
    assert (plain.image_reliant, plain.reliance, plain.reliance_nats, plain.reliance_seconds) == (None, None, None, 0.0)


class Slow:
    """A backend without batches of its own."""

    name, reason, adapter_sha256 = "slow", "it is a test", None

    def generate(self, requests: Sequence[Request]) -> Iterator[Token | tuple[int, Answer]]:
        if not requests[0].question.strip():
            raise RequestRefused("Nothing is asked.")
        yield Token(0, requests[0].question)

    def swap_adapter(self, folder: Path | None) -> None:
        raise AssertionError


def test_a_backend_without_batches_answers_in_order() -> None:
    batch = open_batch(Slow())
    assert isinstance(batch, Serial)
    batch.add([(n, Request(PICTURES[0], word)) for n, word in enumerate(["a", " ", "b", "c"])])
    batch.drop(2)
    assert batch.step() == [Token(0, "a")] and batch.step() == []
    with pytest.raises(RequestRefused):
        batch.step()
    assert batch.step() == [Token(3, "c")] and batch.active == (3,)
    batch.close()
    assert batch.active == () and batch.step() == []
