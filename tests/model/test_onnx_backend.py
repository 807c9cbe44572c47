"""The ONNX backend against the torch backend and PEFT, batch against single, kept turns, swaps, refusals."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from model import onnx_session
from model.adapters import AdapterRejected
from model.backends import Answer, Request, RequestRefused, Token, TorchBackend
from model.llava import ModelError
from model.onnx_backend import OnnxBackend
from tests.model.lora import random_adapter
from tests.model.onnx_made import PICTURES, QUESTIONS, REQUESTS, answers, quantized

onnx = pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be quantized for ONNX Runtime")


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny, tmp_path_factory.mktemp("onnx") / "float", 32)


@pytest.fixture(scope="module")
def four(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny, tmp_path_factory.mktemp("onnx") / "four", 4)


@pytest.fixture
def exact(folder: Path) -> OnnxBackend:
    return OnnxBackend(folder, device="cpu", keep_bytes=0)


def test_text_and_confidence_are_those_of_the_torch_backend(tiny: Path, exact: OnnxBackend) -> None:
    """float32 on both sides; the confidence, a product of up to six probabilities, agrees to a thousandth."""
    torch_backend = TorchBackend(tiny, 32, device="cpu")
    history = Request(PICTURES[0], "right", (("Is there a nodule?", "yes"), ("left", "no")), 6)
    requests = [*REQUESTS, history]
    for ours, theirs in zip(answers(exact, requests), answers(torch_backend, requests), strict=True):
        assert ours.text == theirs.text and ours.finish_reason == theirs.finish_reason and ours.tokens == theirs.tokens
        assert ours.confidence == pytest.approx(theirs.confidence, rel=1e-3, abs=0)
        assert ours.base_sha256 == theirs.base_sha256


def test_an_adapter_answers_as_it_does_in_peft(tiny: Path, exact: OnnxBackend, tmp_path: Path) -> None:
    adapter = random_adapter(tiny, tmp_path / "adapter", 1)
    torch_backend = TorchBackend(tiny, 32, adapter, device="cpu")
    bare = answers(exact, REQUESTS)
    exact.swap_adapter(adapter)
    adapted = answers(exact, REQUESTS)
    for ours, theirs in zip(adapted, answers(torch_backend, REQUESTS), strict=True):
        assert ours.text == theirs.text and ours.adapter_sha256 == theirs.adapter_sha256
        assert ours.confidence == pytest.approx(theirs.confidence, rel=1e-3, abs=0)
    assert [a.confidence for a in adapted] != [a.confidence for a in bare]
    exact.swap_adapter(None)
    again = answers(exact, REQUESTS)
    assert [(a.text, a.confidence) for a in again] == [(a.text, a.confidence) for a in bare]


def test_adapters_of_other_ranks_and_parts_swap_without_export(tiny: Path, exact: OnnxBackend, tmp_path: Path) -> None:
    from model import adapters, llava

    state = adapters.initial(tiny, 2, 4, r"model\.language_model\.layers\.1\.(self_attn\.v_proj|mlp\.down_proj)", 5)
    for name in state:
        state[name] = np.random.default_rng(3).standard_normal(state[name].shape).astype(np.float32)
    adapters.save(tmp_path / "part", state, adapters.spec_of(state, 4, llava.base_sha256(tiny)))
    exact.swap_adapter(random_adapter(tiny, tmp_path / "whole", 2))
    exact.swap_adapter(tmp_path / "part")
    theirs = answers(TorchBackend(tiny, 32, tmp_path / "part", device="cpu"), REQUESTS)
    assert [a.text for a in answers(exact, REQUESTS)] == [a.text for a in theirs]


def test_a_refused_adapter_leaves_the_former_one_answering(tiny: Path, exact: OnnxBackend, tmp_path: Path) -> None:
    exact.swap_adapter(random_adapter(tiny, tmp_path / "good", 1))
    before = answers(exact, REQUESTS)
    with pytest.raises(AdapterRejected, match="another base model"):
        exact.swap_adapter(random_adapter(tiny, tmp_path / "other", 2, base_sha256="0" * 64))
    from model import adapters, llava

    state = adapters.initial(tiny, 2, 4, "projector", 5)
    adapters.save(tmp_path / "projector", state, adapters.spec_of(state, 4, llava.base_sha256(tiny)))
    with pytest.raises(AdapterRejected, match="has no place in this ONNX model"):
        exact.swap_adapter(tmp_path / "projector")
    after = answers(exact, REQUESTS)
    assert [(a.text, a.confidence, a.adapter_sha256) for a in after] == [
        (a.text, a.confidence, a.adapter_sha256) for a in before
    ]


@pytest.mark.parametrize("kind", ["folder", "four"])
def test_a_batch_answers_like_single_questions(kind: str, request: pytest.FixtureRequest) -> None:
    backend = OnnxBackend(request.getfixturevalue(kind), device="cpu", keep_bytes=0)
    for asked, answer in zip(REQUESTS, answers(backend, REQUESTS), strict=True):
        alone = answers(backend, [asked])[0]
        assert alone.text == answer.text
        assert alone.confidence == pytest.approx(answer.confidence, rel=0.02 if kind == "four" else 1e-4, abs=0)


def test_requests_join_and_leave_at_any_token(exact: OnnxBackend) -> None:
    alone = [answers(exact, [asked])[0].text for asked in REQUESTS]
    found: dict[int, Answer] = {}
    batch = exact.open_batch(keep=False)
    batch.add([(0, REQUESTS[0]), (1, REQUESTS[1])])
    batch.step()
    batch.add([(2, REQUESTS[2]), (4, REQUESTS[4])])
    batch.step()
    batch.drop(0)
    batch.add([(3, REQUESTS[3])])
    while batch.active:
        found |= dict(item for item in batch.step() if isinstance(item, tuple))
    batch.close()
    assert {n: a.text for n, a in found.items()} == {n: alone[n] for n in (1, 2, 3, 4)}


def test_pieces_join_to_the_answer(exact: OnnxBackend) -> None:
    told = [""] * len(REQUESTS)
    for item in exact.generate(REQUESTS):
        if isinstance(item, Token):
            told[item.index] += item.text
        else:
            assert told[item[0]] == item[1].text
            assert 0 < item[1].first_token_seconds <= item[1].seconds and item[1].peak_bytes > 0
    assert any(told)


def test_the_next_turn_runs_only_its_new_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, plain = OnnxBackend(folder, device="cpu"), OnnxBackend(folder, device="cpu", keep_bytes=0)
    sizes: list[int] = []
    run = backend.decoder.run

    def noting(embedded: np.ndarray, *rest: object) -> np.ndarray:
        sizes.append(embedded.shape[1])
        return run(embedded, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(backend.decoder, "run", noting)
    backend.prepare(PICTURES[0])
    pictures = sizes.pop()
    monkeypatch.setattr(backend, "features", lambda image: pytest.fail("the picture was encoded again"))
    first = answers(backend, [Request(PICTURES[0], QUESTIONS[1], max_new_tokens=6)])[0]
    assert pictures >= backend.loaded.image_tokens and max(sizes) < 40
    sizes.clear()
    turn = Request(PICTURES[0], "left", ((QUESTIONS[1], first.text),), 6)
    second = answers(backend, [turn])[0]
    assert max(sizes) < 20 and second.text == answers(plain, [turn])[0].text


def test_reliance_is_that_of_the_torch_backend(tiny: Path, folder: Path) -> None:
    asked = [Request(PICTURES[1], QUESTIONS[0], max_new_tokens=4, reliance=True)]
    ours = answers(OnnxBackend(folder, device="cpu"), asked)[0]
    theirs = answers(TorchBackend(tiny, 32, device="cpu"), asked)[0]
    assert ours.reliance == theirs.reliance
    assert ours.reliance_nats == pytest.approx(theirs.reliance_nats, abs=1e-3)


def test_the_reason_says_what_really_runs(four: Path) -> None:
    backend = OnnxBackend(four, device="cpu", threads=1)
    assert backend.reason == (
        "CPU was asked for; ONNX Runtime runs on CPU with 1 threads; int4 in blocks of 256 weights, int8 vision."
    )
    assert backend.static_bytes > 0 and backend.loaded.bits == 4


def test_a_silent_fallback_to_the_cpu_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    plain = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: plain(path, options, [providers[-1]])
    )
    with pytest.raises(ModelError, match="CUDAExecutionProvider was asked for but"):
        OnnxBackend(folder, device="cuda")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ModelError, match="no device 'tpu'"):
        onnx_session.providers("tpu")


@pytest.mark.parametrize("asked", [Request(PICTURES[0], "  "), Request(PICTURES[0], "what " * 600)])
def test_requests_that_cannot_be_answered_are_refused(exact: OnnxBackend, asked: Request) -> None:
    with pytest.raises(RequestRefused):
        answers(exact, [asked])
    assert answers(exact, REQUESTS[:1])[0].tokens


def test_a_changed_or_missing_file_is_refused(four: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(four, tmp_path / "copy")
    data = bytearray((copy / "decoder.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "decoder.onnx.data").write_bytes(data)
    with pytest.raises(ModelError, match=r"decoder\.onnx\.data is damaged"):
        OnnxBackend(copy)
    (copy / "vision.onnx").unlink()
    (copy / "decoder.onnx.data").unlink()
    with pytest.raises(ModelError, match="is missing"):
        OnnxBackend(copy)
