"""Quantizing: packed weights, graphs against torch, same bytes twice, resuming, refusals, the command, the choice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from model import llava, manifest, onnx_decoder, onnx_session, onnx_vision, quantize
from model.backend_choice import open_backend, why
from model.backends import TorchBackend
from model.llava import ModelError
from model.onnx_backend import OnnxBackend
from model.onnx_source import Source, config, plain
from model.onnx_weights import pack, unpack
from model.quantize_cli import quantize as command
from tests.model.lora import random_adapter
from tests.model.onnx_made import PICTURES, REQUESTS, answers, quantized

onnx = pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be quantized for ONNX Runtime")


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.012), (4, 0.11)])
@pytest.mark.parametrize("columns", [64, 100])
def test_packed_weights_are_close_and_better_than_plain_rounding(bits: int, bound: float, columns: int) -> None:
    weight = torch.randn(48, columns, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    packed, scales, zeros = pack(weight, bits, 32)
    assert packed.shape == (48, -(-columns // 32), 32 * bits // 8) and packed.dtype == np.uint8
    found = unpack(packed, scales, zeros, bits, columns)
    assert (found[3] == 0).all()
    error = np.linalg.norm(found - weight.numpy()) / np.linalg.norm(weight)
    padded = torch.nn.functional.pad(weight, (0, -columns % 32)).reshape(48, -1, 32)
    step = padded.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded = ((padded / step).round() * step).nan_to_num().reshape(48, -1)[:, :columns]
    assert error < bound and error < float((rounded - weight).norm() / weight.norm())


def test_the_runtime_reads_the_packed_weights_as_written(tiny: Path, tmp_path: Path) -> None:
    """Reference: numpy on the unpacked weights; the runtime also rounds its input to 8 bits."""
    import onnxruntime

    from model.onnx_graph import Graph

    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    graph = Graph(tmp_path, "one", 4, 32)
    graph.input("x", "float32", ["n", 64])
    graph.node("Identity", graph.linear("x", "layer", weight, torch.ones(32)), outputs=["y"])
    graph.output("y", "float32", ["n", 32])
    graph.save()
    onnx.checker.check_model(str(tmp_path / "one.onnx"))
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    found = onnxruntime.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})
    expected = x @ unpack(*pack(weight, 4, 32), 4, 64).T + 1
    assert np.abs(found[0] - expected).max() < 0.02 * np.abs(expected).max()


def test_the_float_graphs_give_the_logits_and_features_of_torch(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = OnnxBackend(quantized(tiny, tmp_path / "float", 32), device="cpu")
    loaded = llava.load(tiny, 32, device="cpu")
    core = loaded.core
    pixels = loaded.processor.image_processor(images=[PICTURES[0]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = core.model.get_image_features(pixel_values=pixels).pooler_output[0].numpy()
        features = backend.features(PICTURES[0])
        assert np.abs(features - expected).max() < 1e-4
        embedded = torch.randn(1, 11, core.config.text_config.hidden_size)
        logits = core.lm_head(core.model.language_model(inputs_embeds=embedded).last_hidden_state).numpy()
    monkeypatch.setattr(onnx_session, "_CHUNK", 3)
    cache = backend.decoder.cache()
    cache.ensure(1, 11)
    first = backend.decoder.run(embedded[:, :6].numpy(), cache, 0, [0], 6)
    second = backend.decoder.run(embedded[:, 6:].numpy(), cache, 0, [6], 5)
    assert np.abs(np.concatenate([first, second], 1) - logits).max() < 1e-3
    pieces = backend.decoder.run(embedded.numpy(), cache, 0, [0], 2)
    assert np.abs(pieces - logits[:, -2:]).max() < 1e-3


def test_the_same_model_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    first = quantize.quantize(tiny, tmp_path / "a", quantize.plan(4))
    second = quantize.quantize(tiny, tmp_path / "b", quantize.plan(4))
    assert first == second and first["calibration"] is None and first["bits"] == 4
    assert manifest.verify(tmp_path / "a")["base_sha256"] == llava.base_sha256(tiny)


def test_a_run_that_was_cut_off_goes_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(onnx_decoder, "write", failing)
    with pytest.raises(OSError, match="disk full"):
        quantize.quantize(tiny, tmp_path / "out", quantize.plan(8))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(onnx_vision, "write", lambda *args: pytest.fail("the vision graph was made again"))
    quantize.quantize(tiny, tmp_path / "out", quantize.plan(8))
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    assert quantize.quantize(tiny, tmp_path / "out", quantize.plan(8)) == manifest.verify(tmp_path / "out")
    with pytest.raises(ModelError, match="other bits"):
        quantize.quantize(tiny, tmp_path / "out", quantize.plan(4))


def test_what_no_graph_reproduces_is_refused(tiny: Path, tmp_path: Path) -> None:
    text = config(tiny)["text_config"]
    for change in ({"model_type": "phi"}, {"sliding_window": 8}, {"rope_parameters": {"rope_type": "yarn"}}):
        with pytest.raises(ModelError, match="--backend torch"):
            onnx_decoder.shape_of({**text, **change})
    with pytest.raises(ModelError, match="is not offered"):
        quantize.plan(5)
    with pytest.raises(ModelError, match="no weights"):
        Source(tmp_path)


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "text.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "text.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias", "tower.encoder.layers.0.mlp.fc1.bias"),
        ("model.multi_modal_projector.linear_1.bias", "projector.linear_1.bias"),
    ],
)
def test_names_of_every_edition_are_known(stored: str, ours: str) -> None:
    assert plain(stored) == ours


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).write_text("{")
    with pytest.raises(ModelError, match="missing or damaged"):
        manifest.verify(tmp_path)
    (tmp_path / manifest.NAME).write_text(
        json.dumps({"format": 1, "files": {"../x": {"bytes": 1, "sha256": "0" * 64}}})
    )
    with pytest.raises(ModelError, match="quantize again"):
        manifest.verify(tmp_path)


def test_the_command_writes_a_folder_that_the_choice_opens(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(command, [str(tiny), "--bits", "4", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["bits"] == 4
    chosen = open_backend(out, device="cpu")
    assert isinstance(chosen, OnnxBackend) and "onnx" in why(out)
    with pytest.raises(ModelError, match="not 8"):
        open_backend(out, 8)
    assert isinstance(open_backend(tiny, 32, device="cpu"), TorchBackend) and "torch" in why(tiny)


@pytest.mark.parametrize("arguments", [["missing", "--out", "x"], ["{}", "--out", "{}"]])
def test_the_command_says_plainly_why_it_refuses(tiny: Path, arguments: list[str]) -> None:
    done = CliRunner().invoke(command, [part.format(tiny) for part in arguments])
    assert done.exit_code == 1 and "Traceback" not in done.output and "Error:" in done.output


@pytest.mark.parametrize("bits", ["8", "4"])
def test_weights_for_torch_answer_as_when_quantized_at_loading(tiny: Path, tmp_path: Path, bits: str) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(command, [str(tiny), "--backend", "torch", "--bits", bits, "--out", str(out)])
    assert done.exit_code == 0 and "manifest" not in done.output, done.output
    adapter = random_adapter(tiny, tmp_path / "adapter", 1)
    ours, theirs = open_backend(out, adapter=adapter, device="cpu"), TorchBackend(tiny, int(bits), adapter, "cpu")
    for one, other in zip(answers(ours, REQUESTS), answers(theirs, REQUESTS), strict=True):
        assert (one.text, one.confidence, one.base_sha256) == (other.text, other.confidence, other.base_sha256)
    assert "quantized before" in ours.reason and "torch" in why(out)
