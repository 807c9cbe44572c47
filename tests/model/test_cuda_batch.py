"""Rows that join, end and leave in recorded steps choose what `decode.Batch` chooses, on a GPU or interpreted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model import test_cuda_kernels as kernels

from model import cuda_batch, decode  # isort: skip - the interpreter is chosen before Triton is imported

half = kernels.half
BANNED = [0, 1]


@pytest.fixture
def recorded(half: Any) -> cuda_batch.Recorded:
    return cuda_batch.Recorded(half.core, BANNED)


def rows(core: Any, count: int) -> list[decode.Row]:
    """Prompts of different lengths, from 9 to 9 + 20 (count - 1) ids, that may take 4 tokens or more."""
    draw = np.random.default_rng(3)
    prompts = [draw.integers(3, 60, 9 + 20 * n).tolist() for n in range(count)]
    return [decode.Row(n, prompt, 4 + n % 3, kernels.head(core, prompt[: 3 + n])) for n, prompt in enumerate(prompts)]


def alone(core: Any, row: decode.Row) -> list[int]:
    batch, found = decode.Batch(core, BANNED), []
    batch.join([row])
    while batch.rows:
        found += [step.token for step in batch.step()]
    return found


def test_rows_that_join_one_after_the_other(recorded: cuda_batch.Recorded) -> None:
    core = recorded.decoder.core
    asked = rows(core, 4)
    batch, found, ended = cuda_batch.GraphBatch(recorded), {n: [] for n in range(4)}, {}
    batch.join(asked[:1])
    waiting = asked[1:]
    while batch.rows or waiting:
        for step in batch.step():
            found[step.index].append(step.token)
            if step.finished:
                ended[step.index] = batch.layers(step.index)[0][0].clone()
        if waiting:
            batch.join([waiting.pop(0)])
    for row in asked:
        assert found[row.index] == alone(core, row), row.index
        assert ended[row.index].shape[2] == len(row.prompt) + len(found[row.index]) - 1


def test_kept_keys_and_values_are_those_of_the_row(recorded: cuda_batch.Recorded) -> None:
    core = recorded.decoder.core
    asked = rows(core, 3)
    batch, usual = cuda_batch.GraphBatch(recorded), decode.Batch(core, BANNED)
    batch.join(asked), usual.join(asked)
    compared = 0
    while usual.rows:
        steps = {step.index: step for step in usual.step()}
        for step in batch.step():
            assert step.token == steps[step.index].token and step.finished == steps[step.index].finished
            if step.finished:
                for ours, theirs in zip(batch.layers(step.index), usual.layers(step.index), strict=True):
                    kernels.near(ours[0], theirs[0].float(), 1e-2)
                    kernels.near(ours[1], theirs[1].float(), 1e-2)
                compared += 1
    assert compared == 3 and not batch.rows


def test_a_prompt_whose_last_token_alone_is_missing(recorded: cuda_batch.Recorded) -> None:
    core = recorded.decoder.core
    asked = [
        decode.Row(row.index, row.prompt, row.limit, kernels.head(core, list(row.prompt[:-1]))) for row in rows(core, 2)
    ]
    batch, found = cuda_batch.GraphBatch(recorded), {0: [], 1: []}
    batch.join(asked[:1])
    batch.join(asked[1:])
    while batch.rows:
        for step in batch.step():
            found[step.index].append(step.token)
            if step.finished:
                kept = batch.layers(step.index)[0][0].shape[2]
                assert kept == len(asked[step.index].prompt) + len(found[step.index]) - 1
    assert found == {row.index: alone(core, row) for row in asked}


def test_a_row_that_leaves_disturbs_nobody_and_buffers_are_used_again(recorded: cuda_batch.Recorded) -> None:
    core = recorded.decoder.core
    asked = rows(core, 3)
    for _ in range(2):
        batch, found = cuda_batch.GraphBatch(recorded), {n: [] for n in range(3)}
        batch.join(asked)
        batch.leave(1)
        batch.step()
        batch.leave(99)
        while batch.rows:
            for step in batch.step():
                found[step.index].append(step.token)
        assert not found[1]
        for n in (0, 2):
            assert found[n] == alone(core, asked[n])[1:]
        batch.close()
        assert recorded._spare is not None
    longer = decode.Row(7, asked[2].prompt * 8, 3, asked[2].prefix)
    batch = cuda_batch.GraphBatch(recorded)
    batch.join(asked[:1])
    batch.step()
    batch.join([longer])
    told = [step for _ in range(9) for step in batch.step()]
    assert [step.token for step in told if step.index == 7] == alone(core, longer)
    assert [step.token for step in told if step.index == 0] == alone(core, asked[0])[1:]


def test_what_has_no_kernels_is_said(tiny: Path) -> None:
    from model import cuda_decoder, llava

    core = llava.load(tiny, 32, device="cpu").core
    assert cuda_decoder.unsuitable(core) == "it is not on a CUDA device"
    config = core.config.text_config
    assert cuda_decoder.unsuitable_kind(config) is None
    config.intermediate_size = 88
    assert "multiples of 64" in str(cuda_decoder.unsuitable_kind(config))
    config.hidden_act = "gelu"
    assert "gelu" in str(cuda_decoder.unsuitable_kind(config))
    config.model_type = "phi"
    assert "phi" in str(cuda_decoder.unsuitable_kind(config))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_backend_on_cuda_answers_as_without_recorded_steps(tiny: Path, bits: int) -> None:
    from model.backends import TorchBackend
    from tests.model.test_batching import REQUESTS, alone

    fast, slow = (TorchBackend(tiny, bits, device="cuda", keep_bytes=0, recorded=yes) for yes in (True, False))
    assert "recorded steps" in fast.reason and "recorded" not in slow.reason
    for request in REQUESTS[:4]:
        a, b = alone(fast, request), alone(slow, request)
        assert a.confidence == pytest.approx(b.confidence, rel=0.05) or a.text != b.text
