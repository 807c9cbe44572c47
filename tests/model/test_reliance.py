"""Image reliance: the log-probabilities are the backend's own, and a picture that is grey already changes nothing."""

import math

import numpy as np
import pytest

from model import phantoms, reliance
from model.backends import Request, TorchBackend
from model.presets import reference_path
from model.prompts import AFYA, encode


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return TorchBackend(reference_path(), 32)


def asked(backend: TorchBackend, pictures: list[np.ndarray], questions: list[str]) -> list[tuple[float, float, float]]:
    """For each question the log-confidence of the backend, the log-probability with the picture, and with grey."""
    tokenizer, core = backend.loaded.processor.tokenizer, backend.loaded.core
    requests = [Request(picture, question) for picture, question in zip(pictures, questions, strict=True)]
    found = dict(item for item in backend.generate(requests) if isinstance(item, tuple))
    answers = [found[number] for number in range(len(requests))]
    prompts = [encode(tokenizer, AFYA, [(q, "")], core.config.image_seq_length, None)[0] for q in questions]
    ids = [[*tokenizer(a.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for a in answers]
    given = (prompts, ids, backend.banned_ids())
    real = reliance.log_probabilities(core, backend.loaded.processor, pictures, *given)
    grey = reliance.log_probabilities(core, backend.loaded.processor, [reliance.blank(p) for p in pictures], *given)
    return [(math.log(a.confidence), r, g) for a, r, g in zip(answers, real, grey, strict=True)]


def test_one_pass_gives_the_probability_that_decoding_gave(backend: TorchBackend) -> None:
    rows = phantoms.make(2, list(phantoms.SCANNERS)[:1], seed=8)[:6]
    found = asked(backend, [row.image for row in rows], [row.question for row in rows])
    for confidence, real, _ in found:
        assert real == pytest.approx(confidence, abs=1e-4)
    assert any(abs(real - grey) > 0.1 for _, real, grey in found)


def test_without_anything_to_see_no_answer_relies_on_the_picture(backend: TorchBackend) -> None:
    grey = np.full((90, 70, 3), reliance.GREY, np.uint8)
    for _, real, without in asked(backend, [grey, grey], ["Is there a mass in the lung?", "Which organ is shown?"]):
        assert reliance.judge(real - without) == reliance.Reliance("not image-reliant", pytest.approx(0.0, abs=1e-6))


@pytest.mark.parametrize(
    ("nats", "mark"),
    [(3.0, "image-reliant"), (0.3, "unsure"), (0.05, "not image-reliant"), (-2.0, "not image-reliant")],
)
def test_the_marks(nats: float, mark: str) -> None:
    assert reliance.judge(nats).mark == mark
