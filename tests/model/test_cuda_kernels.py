"""The kernels of recorded steps against PyTorch: on a CUDA device where there is one, else in Triton's interpreter."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import attach, decode, llava
from tests.model.lora import random_adapter

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed, so the kernels cannot be tried")
DEVICE = "cuda" if ON_GPU else "cpu"

from model import cuda_decoder, cuda_step  # noqa: E402 - the interpreter is chosen before Triton is imported


def layer(bits: int, n: int, k: int, bias: bool) -> Any:
    """A linear layer as bitsandbytes holds it at `bits`."""
    import bitsandbytes

    torch.manual_seed(n + k)
    plain = torch.nn.Linear(k, n, bias=bias).half()
    if bits == 16:
        return plain.to(DEVICE)
    made: Any
    if bits == 4:
        made = bitsandbytes.nn.Linear4bit(
            k, n, bias, torch.float16, compress_statistics=True, quant_type="nf4", device="cpu"
        )
    else:
        made = bitsandbytes.nn.Linear8bitLt(k, n, bias, has_fp16_weights=False, threshold=0.0, device="cpu")
    made.load_state_dict(plain.state_dict())
    return made.to(DEVICE)


def dense(module: Any, bits: int) -> torch.Tensor:
    """The weights that a layer stands for, float32."""
    import bitsandbytes

    if bits == 16:
        return module.weight.detach().float()
    if bits == 4:
        return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    scale = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    return module.weight.data.float() * scale[:, None] / 127


@pytest.mark.parametrize("rows", [1, 2, 3, 17])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_product_equals_the_one_with_unpacked_weights(bits: int, rows: int) -> None:
    modules = [layer(bits, n, 192, bias=True) for n in (96, 32, 64)]
    before = [dense(module, bits) for module in modules]
    packed = cuda_decoder.joined(modules)
    for module, was in zip(modules, before, strict=True):
        assert torch.equal(dense(module, bits), was), "the layers themselves stay what they were"
    x = torch.randn(rows, 192, dtype=torch.float16, device=DEVICE)
    y = torch.full((rows, 192), torch.nan, dtype=torch.float16, device=DEVICE)
    launched(packed, x, y, rows)
    biases = torch.cat([module.bias.float() for module in modules])
    near(y, x.float() @ torch.cat(before).T + biases, 4e-3)


@pytest.mark.parametrize(("rows", "bias"), [(1, False), (5, False), (1, True), (5, True)])
def test_a_gated_product_and_one_that_adds_to_its_target(rows: int, bias: bool) -> None:
    gate, up, down = layer(4, 128, 64, bias), layer(4, 128, 64, bias), layer(4, 64, 128, False)
    x = torch.randn(rows, 64, dtype=torch.float16, device=DEVICE)
    y = torch.zeros(rows, 128, dtype=torch.float16, device=DEVICE)
    launched(cuda_decoder.joined([gate, up]), x, y, rows, gated=True)
    with torch.no_grad():
        first, second = (x.float() @ dense(part, 4).T + (part.bias.float() if bias else 0) for part in (gate, up))
    exact = torch.nn.functional.silu(first) * second
    near(y, exact, 4e-3)
    state = x.clone()
    launched(cuda_decoder.joined([down]), y, state, rows, residual=True)
    near(state, x.float() + y.float() @ dense(down, 4).T, 4e-3)


def launched(packed: Any, x: Any, y: Any, rows: int, **how: bool) -> None:
    """Run one product as a decoder does."""
    made = cuda_step.Decoder.__new__(cuda_step.Decoder)
    made.tuned = cuda_step.TUNED
    memory = cuda_step.Memory.__new__(cuda_step.Memory)
    memory.low = torch.zeros(rows, 64, dtype=torch.float32, device=DEVICE)
    made._product(packed, x, y, memory, rows, **how)


def near(found: torch.Tensor, exact: torch.Tensor, limit: float) -> None:
    error = (found.float() - exact).norm() / exact.norm()
    assert error < limit, float(error)


@pytest.fixture
def half(tiny: Path) -> Any:
    """The small model in float16."""
    loaded = llava.load(tiny, 32, device="cpu")
    loaded.model.half().to(DEVICE)
    return loaded


@pytest.mark.parametrize("adapted", [False, True])
def test_steps_choose_what_the_network_chooses(half: Any, adapted: bool, tiny: Path, tmp_path: Path) -> None:
    if adapted:
        half = attach.attach(half, random_adapter(tiny, tmp_path / "adapter"))
    core, banned = half.core, [0, 1]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 60, size).tolist() for size in (9, 70, 140)]
    rows = [decode.Row(n, prompt, 8, head(core, prompt[:4])) for n, prompt in enumerate(prompts)]
    usual = decode.Batch(core, banned)
    usual.join(rows)
    first = {step.index: step for step in usual.step()}
    with torch.no_grad():
        decoder = cuda_step.Decoder(core, sorted(set(banned) - decode.end_ids(core)))
        memory = cuda_step.Memory(decoder, 4, 256)
        mask, layers, _ = decode.prefill(core, rows)
        for n, prompt in enumerate(prompts):
            for number, (keys, values) in enumerate(layers):
                memory.keys[number, n, :, : len(prompt)] = keys[n][:, mask[n].bool()]
                memory.values[number, n, :, : len(prompt)] = values[n][:, mask[n].bool()]
            memory.tokens[n], memory.lengths[n] = first[n].token, len(prompt)
        for _ in range(3):
            decoder.step(memory, 3)
            ids, odds = memory.found[:, :3].tolist()
            for step in usual.step():
                assert ids[step.index] == step.token
                assert odds[step.index] == pytest.approx(step.probability, rel=0.02)


def head(core: Any, ids: list[int]) -> decode.Layers:
    """Keys and values of the first ids of a prompt."""
    with torch.no_grad():
        given = torch.tensor([ids], device=core.device)
        cache = decode._cache([])
        decode.states(core, core.get_input_embeddings()(given), torch.ones_like(given), cache)
        return decode._layers(cache)
