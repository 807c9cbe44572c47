"""Loading at every precision, refusing what is wrong, and the traps of 4 bits on a CPU, each shown without its fix."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import adapters, decode, llava
from model.backends import Request, TorchBackend
from model.build import build
from tests.model.lora import random_adapter
from tests.tiny import CORPUS, TINY

PICTURES = [np.random.default_rng(n).integers(0, 256, (40 + n, 50, 3), dtype=np.uint8) for n in range(3)]

packed_kernel = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no AVX512_BF16: the packed 4-bit kernel is not used"
)


def ask(loaded: llava.Loaded, count: int = 1) -> list[Any]:
    requests = [Request(PICTURES[n], "Is there a nodule?", max_new_tokens=3) for n in range(count)]
    return [item[1] for item in TorchBackend.wrap(loaded).generate(requests) if isinstance(item, tuple)]


def test_base_sha256_is_of_the_content_alone(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "other name"))
    (copy / "README.md").write_text("a card")
    assert llava.base_sha256(copy) == llava.base_sha256(tiny)
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert llava.base_sha256(copy) != llava.base_sha256(tiny)


@pytest.mark.parametrize("bits", llava.BITS)
def test_every_precision_loads_and_answers(tiny: Path, bits: int) -> None:
    loaded = llava.load(tiny, bits, device="cpu")
    kinds = {name: type(layer).__name__ for name, layer in loaded.core.named_modules() if "Linear" in str(type(layer))}
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {{8: "Linear8bitLt", 4: "Linear4bit"}.get(bits, "Linear")}
    assert "CPU" in loaded.reason and loaded.reason.endswith(".")
    assert ask(loaded)[0].bits == bits


@pytest.mark.parametrize(("bits", "device"), [(5, None), (4, "cuda:77")])
def test_what_is_not_offered_is_refused(tiny: Path, bits: int, device: str | None) -> None:
    if device and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(llava.ModelError):
        llava.load(tiny, bits, device=device)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(llava.ModelError, match=r"config\.json"):
        llava.load(tmp_path, 4)


def test_damaged_and_incomplete_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(llava.ModelError, match="cannot be loaded"):
        llava.load(folder, 32)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    lost = next(name for name in tensors if "down_proj" in name)
    del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(llava.ModelError, match="lacks 1 weights"):
        llava.load(folder, 32)


# --- gradients after an answer ----------------------------------------------------------------------------------------


def layers_without_gradient(loaded: llava.Loaded) -> int:
    """Answer once, then count the B factors of fresh LoRA layers that a backward pass leaves without a gradient."""
    from peft import LoraConfig, get_peft_model

    ask(loaded)
    targets = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    network = get_peft_model(loaded.core, LoraConfig(r=4, target_modules=targets)).train()
    ids = torch.arange(20, 30)[None]
    hidden = network.get_base_model().model.language_model(input_ids=ids).last_hidden_state
    network.get_base_model().lm_head(hidden).logsumexp(-1).sum().backward()
    factors = [value for name, value in network.named_parameters() if "lora_B" in name]
    assert len(factors) == 7 * TINY.decoder_layers
    return sum(f.grad is None or not f.grad.abs().max() > 0 for f in factors)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_layer_learns_after_an_answer(tiny: Path, bits: int) -> None:
    assert layers_without_gradient(llava.load(tiny, bits, device="cpu", train=True)) == 0


@packed_kernel
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
def test_without_the_fix_gradients_are_lost_silently(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava, "keep_gradients", lambda network: None)
    loaded = llava.load(tiny, 4, device="cpu", train=True)
    assert layers_without_gradient(loaded) > 0, "bitsandbytes has repaired this: keep_gradients can go"


# --- shapes the 4-bit kernel does not take ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose decoder and tower have MLP widths that are no multiple of 64 or 32."""
    folder = tmp_path_factory.mktemp("odd")
    network, processor = build(replace(TINY, decoder_mlp=88, tower_mlp=100), CORPUS, 0)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_odd_shapes_are_quantized_and_answer(odd: Path) -> None:
    import bitsandbytes

    loaded = llava.load(odd, 4, device="cpu")
    layers = dict(loaded.core.named_modules())
    assert {name for name, layer in layers.items() if type(layer) is torch.nn.Linear} == {"lm_head"}
    ask(loaded)
    for name in ("model.language_model.layers.0.mlp.down_proj", "model.vision_tower.encoder.layers.1.mlp.fc2"):
        layer = layers[name]
        weights = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        x = torch.randn(3, layer.in_features)
        bias = 0 if layer.bias is None else layer.bias.float()
        assert torch.allclose(layer(x), x @ weights.T + bias, atol=1e-5)


def test_weights_that_fill_no_blocks_keep_their_precision(odd: Path) -> None:
    from transformers import LlavaConfig

    config = LlavaConfig.from_pretrained(odd)
    assert llava.unquantized(config) == ["lm_head"]
    config.text_config.intermediate_size = 87
    config.text_config.hidden_size = 60
    assert "model.language_model.layers.0.mlp.down_proj" in llava.unquantized(config)


@packed_kernel
def test_without_the_fix_odd_shapes_crash(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava, "_PACKED", "nothing")
    loaded = llava.load(odd, 4, device="cpu")
    with pytest.raises((AssertionError, RuntimeError)):
        ask(loaded)


# --- inputs that are not contiguous -----------------------------------------------------------------------------------


def features(loaded: llava.Loaded, count: int) -> Any:
    return decode.encode_pictures(loaded.core, loaded.processor, PICTURES[:count])[0][0]


@pytest.mark.parametrize("bits", [4, 8])
def test_one_picture_is_read_as_in_a_batch(tiny: Path, bits: int) -> None:
    loaded = llava.load(tiny, bits, device="cpu")
    assert torch.allclose(features(loaded, 1), features(loaded, 3), rtol=0.02, atol=0.01)


@packed_kernel
def test_without_the_fix_one_picture_is_read_wrong(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava, "contiguous_inputs", lambda network: None)
    loaded = llava.load(tiny, 4, device="cpu")
    one, three = features(loaded, 1), features(loaded, 3)
    assert (one - three).norm() > 0.5 * three.norm(), "bitsandbytes has repaired this: contiguous_inputs can go"


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_is_attached_unmerged(tiny: Path, tmp_path: Path) -> None:
    folder = random_adapter(tiny, tmp_path / "a")
    loaded = llava.load(tiny, 4, adapter=folder, device="cpu")
    assert loaded.adapter_sha256 == adapters.sha256(folder)
    assert loaded.base_sha256 == llava.base_sha256(tiny)
    bare = llava.load(tiny, 4, device="cpu")
    name = "model.language_model.layers.0.self_attn.q_proj"
    layers = dict(loaded.core.named_modules())
    assert torch.equal(layers[f"{name}.base_layer"].weight, bare.core.get_submodule(name).weight)


def test_an_adapter_for_another_base_or_shape_is_refused(tiny: Path, odd: Path, tmp_path: Path) -> None:
    foreign = random_adapter(tiny, tmp_path / "foreign", base_sha256="0" * 64)
    with pytest.raises(adapters.AdapterRejected, match="another base model"):
        llava.load(tiny, 32, adapter=foreign)
    misfit = random_adapter(odd, tmp_path / "misfit", base_sha256=llava.base_sha256(tiny))
    with pytest.raises(adapters.AdapterRejected, match="no place in this model"):
        llava.load(tiny, 32, adapter=misfit)
