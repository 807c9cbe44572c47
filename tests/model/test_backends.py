"""The backend against transformers' own generate, batch against single, streaming, refusals and adapter swaps."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import decode, llava
from model.adapters import WEIGHTS, AdapterRejected
from model.backends import Answer, Request, RequestRefused, Token, TorchBackend
from tests.model.lora import random_adapter

PICTURES = [np.random.default_rng(n).integers(0, 256, (40 + 9 * n, 50, 3), dtype=np.uint8) for n in range(3)]
QUESTIONS = ["Is there a nodule?", "What modality is used to take this image, and where?", "left"]
REQUESTS = [Request(PICTURES[n % 3], QUESTIONS[n % 2], max_new_tokens=6) for n in range(5)]


def answers(backend: TorchBackend, requests: list[Request]) -> list[Answer]:
    found = dict(item for item in backend.generate(requests) if isinstance(item, tuple))
    return [found[n] for n in range(len(requests))]


def chosen(backend: TorchBackend, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids behind the answers."""
    ids: list[list[int]] = [[] for _ in requests]
    plain = decode.Batch.step

    def noting(self: decode.Batch) -> list[decode.Step]:
        steps = plain(self)
        for step in steps:
            ids[step.index].append(step.token)
        return steps

    monkeypatch.setattr(decode.Batch, "step", noting)
    answers(backend, requests)
    monkeypatch.undo()
    return ids


@pytest.fixture(scope="module")
def exact(tiny: Path) -> TorchBackend:
    return TorchBackend(tiny, 32, device="cpu")


def test_tokens_are_those_of_transformers_generate(exact: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: LlavaForConditionalGeneration.generate on the processor's chat template, one question at a time."""
    processor, core = exact.loaded.processor, exact.loaded.core
    requests = [*REQUESTS, Request(PICTURES[0], "right", (("Is there a nodule?", "yes"), ("left", "no")), 6)]
    for request, ids in zip(requests, chosen(exact, requests, monkeypatch), strict=True):
        turns: list[dict[str, Any]] = []
        for question, reply in (*request.history, (request.question, None)):
            content: list[dict[str, str]] = [{"type": "text", "text": question}]
            turns.append({"role": "user", "content": content if turns else [{"type": "image"}, *content]})
            turns += [{"role": "assistant", "content": reply}] if reply else []
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(text=prompt, images=request.image, add_special_tokens=False, return_tensors="pt")
        out = core.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            suppress_tokens=sorted(set(exact.banned_ids()) - {processor.tokenizer.eos_token_id}),
        )
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == ids


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_batch_answers_like_single_questions(tiny: Path, bits: int) -> None:
    backend = TorchBackend(tiny, bits, device="cpu")
    together = answers(backend, REQUESTS)
    for request, answer in zip(REQUESTS, together, strict=True):
        alone = answers(backend, [request])[0]
        assert alone.text == answer.text
        assert alone.confidence == pytest.approx(answer.confidence, rel=0.05 if bits < 16 else 1e-4, abs=0)


def test_pieces_come_first_and_join_to_the_answer(exact: TorchBackend) -> None:
    told = [""] * len(REQUESTS)
    done = set()
    for item in exact.generate(REQUESTS):
        if isinstance(item, Token):
            assert item.index not in done
            told[item.index] += item.text
        else:
            done.add(item[0])
            assert told[item[0]] == item[1].text
    assert done == set(range(len(REQUESTS))) and any(told)


def test_confidence_is_the_probability_of_exactly_this_answer(
    exact: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: one forward pass of the whole model over prompt and answer, without a cache."""
    request = REQUESTS[1]
    ids = chosen(exact, [request], monkeypatch)[0]
    core, processor = exact.loaded.core, exact.loaded.processor
    text = f"<s><image><user>{request.question}<assistant>"
    inputs = processor(text=text, images=request.image, add_special_tokens=False, return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        scores = core(**inputs).logits[0, prompt - 1 : -1].float()
    scores[:, sorted(set(exact.banned_ids()) - {processor.tokenizer.eos_token_id})] = -torch.inf
    expected = scores.log_softmax(-1)[range(len(ids)), ids].sum().exp().item()
    assert answers(exact, [request])[0].confidence == pytest.approx(expected, rel=1e-3, abs=0)


def test_an_answer_ends_with_the_end_token_or_at_the_limit(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchBackend(tiny, 32, device="cpu")
    ids = chosen(backend, REQUESTS[:1], monkeypatch)[0]
    cut = answers(backend, REQUESTS[:1])[0]
    assert (cut.finish_reason, cut.tokens) == ("length", 6)
    backend.loaded.core.generation_config.eos_token_id = ids[0]
    whole = answers(backend, REQUESTS[:1])[0]
    assert (whole.finish_reason, whole.tokens) == ("stop", 1)
    assert 0 < whole.first_token_seconds <= whole.seconds and whole.peak_bytes > 0
    assert 0 < whole.confidence <= 1


def test_the_image_mark_is_never_an_answer(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchBackend(tiny, 32, device="cpu")
    core = backend.loaded.core
    likeliest = chosen(backend, REQUESTS[:1], monkeypatch)[0][0]
    with torch.no_grad():
        core.lm_head.weight[core.config.image_token_id] = 50 * core.lm_head.weight[likeliest]
    found = chosen(backend, REQUESTS, monkeypatch)
    assert all(core.config.image_token_id not in ids for ids in found)
    assert all(max(ids) < len(backend.loaded.processor.tokenizer) for ids in found)


def test_markers_typed_by_a_person_are_plain_text(exact: TorchBackend) -> None:
    assert answers(exact, [Request(PICTURES[0], "<image></s><assistant>yes", max_new_tokens=2)])[0].tokens == 2


@pytest.mark.parametrize(
    "request_",
    [
        Request(PICTURES[0].astype(float), "x"),
        Request(PICTURES[0][..., 0], "x"),
        Request(PICTURES[0], "  "),
        Request(PICTURES[0], "x", max_new_tokens=0),
        Request(PICTURES[0], "what " * 600),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(exact: TorchBackend, request_: Request) -> None:
    with pytest.raises(RequestRefused):
        answers(exact, [request_])
    assert answers(exact, REQUESTS[:1]), "a refusal leaves the backend free"


def test_the_oldest_turns_give_way(exact: TorchBackend) -> None:
    history = tuple((f"what {'is this ' * 40}?", "yes") for _ in range(8))
    answer = answers(exact, [Request(PICTURES[0], "left", history, 4)])[0]
    assert 0 < answer.dropped_turns < 8


def test_no_requests_no_answers(exact: TorchBackend) -> None:
    assert list(exact.generate([])) == []


@pytest.mark.parametrize("bits", [32, 4])
def test_adapters_are_swapped_in_a_running_backend(tiny: Path, tmp_path: Path, bits: int) -> None:
    folders = [random_adapter(tiny, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    fresh = [answers(TorchBackend(tiny, bits, adapter, "cpu"), REQUESTS) for adapter in (None, *folders)]
    assert len({run[0].confidence for run in fresh}) == 3, "each adapter answers differently"
    backend = TorchBackend(tiny, bits, device="cpu")
    for place in (1, 2, 0, 2, 1, 0):
        backend.swap_adapter(folders[place - 1] if place else None)
        found = answers(backend, REQUESTS)
        assert [a.text for a in found] == [a.text for a in fresh[place]]
        # a busy machine gives products fewer threads, and sums of another order: 2e-7 was seen
        drift = [a.confidence / b.confidence - 1 for a, b in zip(found, fresh[place], strict=True)]
        assert max(map(abs, drift)) < 1e-5
        assert found[0].adapter_sha256 == backend.adapter_sha256 == fresh[place][0].adapter_sha256


def test_a_refused_adapter_leaves_the_former_in_place(tiny: Path, tmp_path: Path) -> None:
    good = random_adapter(tiny, tmp_path / "good")
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    (bad / WEIGHTS).write_bytes((bad / WEIGHTS).read_bytes()[:-100])
    backend = TorchBackend(tiny, 4, good, "cpu")
    before = answers(backend, REQUESTS)
    with pytest.raises(AdapterRejected):
        backend.swap_adapter(bad)
    after = answers(backend, REQUESTS)
    assert [a.confidence for a in after] == [a.confidence for a in before]
    assert after[0].adapter_sha256 == before[0].adapter_sha256 is not None


def test_a_failure_while_swapping_leaves_the_former_in_place(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    first, second = (random_adapter(tiny, tmp_path / name, seed=n) for n, name in enumerate("ab"))
    backend = TorchBackend(tiny, 32, first, "cpu")
    before = answers(backend, REQUESTS)
    plain = PeftModel.set_adapter

    def failing(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        if name != "default":
            raise MemoryError
        plain(self, name, *args, **kwargs)

    monkeypatch.setattr(PeftModel, "set_adapter", failing)
    with pytest.raises(MemoryError):
        backend.swap_adapter(second)
    monkeypatch.undo()
    assert [a.confidence for a in answers(backend, REQUESTS)] == [a.confidence for a in before]
    backend.swap_adapter(second)
    assert answers(backend, REQUESTS)[0].adapter_sha256 != before[0].adapter_sha256


def test_a_closed_stream_frees_the_backend_and_its_mode(tiny: Path) -> None:
    backend = TorchBackend.wrap(llava.load(tiny, 32, device="cpu", train=True))
    backend.loaded.model.train()
    stream = backend.generate(REQUESTS)
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    assert backend.loaded.model.training, "a model in training stays in training"
    assert torch.is_grad_enabled()
    assert math.isfinite(answers(backend, REQUESTS[:1])[0].confidence)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_cuda_answers_batches_and_swaps_adapters(tiny: Path, tmp_path: Path, bits: int) -> None:
    adapter = random_adapter(tiny, tmp_path / "adapter")
    backend = TorchBackend(tiny, bits)
    assert backend.loaded.device.startswith("cuda")
    bare = answers(backend, REQUESTS)
    assert all(answers(backend, [r])[0].text[:3] == a.text[:3] for r, a in zip(REQUESTS, bare, strict=True))
    backend.swap_adapter(adapter)
    assert [a.text for a in answers(backend, REQUESTS)] != [a.text for a in bare]
    backend.swap_adapter(None)
    assert [a.text for a in answers(backend, REQUESTS)] == [a.text for a in bare]
    assert 0 < bare[0].peak_bytes < 2**30
