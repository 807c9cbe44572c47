"""A sound model passes at every precision; each seeded fault is refused with one plain sentence."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from kiosk import inference
from kiosk.settings import Settings
from model import canary, llava
from model.adapters import AdapterRejected
from model.backends import TorchBackend
from model.canary_cli import canary as command
from model.checkpoint_facts import FETCHED
from model.llava import ModelError
from model.presets import reference_path
from tests.model.lora import random_adapter


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the folder's weights."""
    path = next(folder.glob("*.safetensors"))
    held = load_file(path)
    change(held)
    save_file(held, path, {"format": "pt"})


def settings(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite one of the folder's JSON files."""
    held = json.loads((folder / name).read_text())
    change(held)
    (folder / name).write_text(json.dumps(held))


def problem(folder: Path, bits: int = 4, **asked: Any) -> str:
    """The sentence that refuses the folder, by loading it or by the canary."""
    try:
        found = canary.check(TorchBackend(folder, bits, device="cpu"), folder, **asked).problem or ""
    except (ModelError, AdapterRejected) as error:
        found = str(error)
    assert found.count("\n") == 0
    return found


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_sound_model_passes(tiny: Path, tmp_path: Path, bits: int) -> None:
    adapter = random_adapter(tiny, tmp_path / "adapter")
    for wanted in (None, adapter):
        backend = TorchBackend(tiny, bits, wanted, "cpu")
        report = canary.check(backend, tiny, device="cpu", adapter=wanted)
        assert report.problem is None
        assert [check.name for check in report.checks] == [
            "device", "files", "adapter", "template", "image tokens", "kernels", "weights", "pictures"]  # fmt: skip
        canary.require(report)


def test_the_reference_model_passes_and_the_kiosk_asks_for_it() -> None:
    assert canary.check(TorchBackend(reference_path(), 4), reference_path()).problem is None
    assert inference.make_backend(Settings()).name == "torch"


def test_no_projector(folder: Path) -> None:
    def drop(held: dict[str, torch.Tensor]) -> None:
        for name in [name for name in held if "projector" in name]:
            del held[name]

    weights(folder, drop)
    assert "lacks 4 weights" in problem(folder)


def test_another_projector_in_memory(folder: Path) -> None:
    for bits in (32, 4):
        backend = TorchBackend(folder, bits, device="cpu")
        other = TorchBackend(folder, bits, device="cpu").loaded.core.model.multi_modal_projector
        with torch.no_grad():
            other.linear_1.bias += 1
        backend.loaded.core.model.multi_modal_projector = other
        found = canary.check(backend, folder).problem or ""
        assert "multi_modal_projector" in found and "not that of" in found


@pytest.mark.parametrize("bits", [32, 4])
def test_a_zeroed_tower(folder: Path, bits: int) -> None:
    def zero(held: dict[str, torch.Tensor]) -> None:
        for name in held:
            if "vision_tower" in name:
                held[name] = torch.zeros_like(held[name])

    weights(folder, zero)
    assert "look alike to the model (features differ by" in problem(folder, bits)


def test_a_tower_zeroed_in_memory(tiny: Path) -> None:
    backend = TorchBackend(tiny, 4, device="cpu")
    packed = backend.loaded.core.model.vision_tower.encoder.layers[0].self_attn.q_proj
    packed.weight.quant_state.absmax.zero_()
    if packed.weight.quant_state.nested:
        packed.weight.quant_state.offset.zero_()
        packed.weight.quant_state.state2.absmax.zero_()
    assert "q_proj computes something else" in (canary.check(backend, tiny).problem or "")
    whole = TorchBackend(tiny, 32, device="cpu")
    whole.loaded.core.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight.data.zero_()
    assert "q_proj.weight in memory is not that of" in (canary.check(whole, tiny).problem or "")


def test_a_wrong_number_of_image_tokens(folder: Path) -> None:
    settings(folder, "config.json", lambda held: held.update(image_seq_length=9))
    assert "makes 4 tokens of a picture, the configuration says 9" in problem(folder)


def test_a_processor_that_writes_another_number_of_image_tokens(folder: Path) -> None:
    settings(folder, "processor_config.json", lambda held: held.update(patch_size=8))
    assert "The processor writes 16 image tokens, the tower makes 4" in problem(folder)


def test_a_silent_fallback_to_the_cpu(tiny: Path) -> None:
    assert "cuda was asked for, but the model runs on cpu" in problem(tiny, device="cuda")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_silent_fallback_to_floats(tiny: Path, bits: int) -> None:
    backend = TorchBackend(tiny, bits, device="cpu")
    plain = TorchBackend(tiny, 32, device="cpu").loaded
    backend.loaded = replace(plain, bits=bits)
    assert f"{bits} bits were asked for, but model." in (canary.check(backend, tiny).problem or "")


def test_a_corrupt_shard(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "cannot be loaded" in problem(folder)
    path.write_bytes(whole)
    backend = TorchBackend(folder, 4, device="cpu")
    path.write_bytes(whole[:-100] + bytes(100))
    assert "not those that were loaded" in (canary.check(backend, folder).problem or "")
    listed = [{"name": path.name, "size": len(whole), "sha256": "0" * 64}]
    (folder / FETCHED).write_text(json.dumps({"files": listed}))
    assert "is not the file that was fetched" in problem(folder)


def test_weights_that_are_no_numbers(folder: Path) -> None:
    def spoil(held: dict[str, torch.Tensor]) -> None:
        name = next(name for name in held if "language_model" in name and "norm" in name)
        held[name] = torch.full_like(held[name], float("nan"))

    weights(folder, spoil)
    assert "scores are not numbers" in problem(folder)


def test_a_wrong_adapter(tiny: Path, tmp_path: Path) -> None:
    foreign = random_adapter(tiny, tmp_path / "foreign", base_sha256="0" * 64)
    with pytest.raises(AdapterRejected, match="trained on another base model"):
        TorchBackend(tiny, 4, foreign, "cpu")
    first, second = (random_adapter(tiny, tmp_path / name, seed=n) for n, name in enumerate("ab"))
    backend = TorchBackend(tiny, 4, first, "cpu")
    assert "Another adapter than b answers" in (canary.check(backend, tiny, adapter=second).problem or "")


def test_an_old_template(folder: Path) -> None:
    (folder / "afya.json").write_text('{"template": "v0"}')
    assert "no conversation template 'v0'" in problem(folder)
    (folder / "afya.json").unlink()
    old = (folder / "chat_template.jinja").read_text().replace("<assistant>", "ASSISTANT:")
    (folder / "chat_template.jinja").write_text(old)
    assert "is not the one in use (afya)" in problem(folder)


def test_a_template_changed_under_a_running_model(tiny: Path) -> None:
    backend = TorchBackend(tiny, 4, device="cpu")
    backend.loaded = replace(backend.loaded, template=llava.prompts.TEMPLATES["v1"])
    assert "is afya, but v1 is in use" in (canary.check(backend, tiny).problem or "")


def test_a_picture_that_comes_in_blank(folder: Path) -> None:
    settings(folder, "processor_config.json", lambda held: held["image_processor"].update(rescale_factor=0.0))
    assert "look alike to the model" in problem(folder)


def test_a_backend_without_parts_is_asked(tiny: Path) -> None:
    class Blind:
        """Answers without looking."""

        adapter_sha256 = None

        def __init__(self) -> None:
            self.plain = TorchBackend(tiny, 32, device="cpu")
            self.sees = True

        @property
        def loaded(self) -> Any:
            held = self.plain.loaded
            return type("Loaded", (), {n: getattr(held, n) for n in ("device", "processor", "template", "path")})

        def generate(self, requests: Any) -> Any:
            grey = [replace(r, image=np.zeros_like(r.image)) for r in requests]
            yield from self.plain.generate(requests if self.sees else grey)

    blind = Blind()
    assert canary.check(blind, tiny).problem is None
    blind.sees = False
    assert "the answers are the same" in (canary.check(blind, tiny).problem or "")


def test_the_command_says_what_is_wrong(tiny: Path, folder: Path) -> None:
    good = CliRunner().invoke(command, ["--model", str(tiny), "--device", "cpu", "--json"])
    assert good.exit_code == 0 and json.loads(good.output)["passed"] is True
    settings(folder, "config.json", lambda held: held.update(image_seq_length=9))
    bad = CliRunner().invoke(command, ["--model", str(folder), "--device", "cpu"])
    assert bad.exit_code == 1 and "FAILED  image tokens" in bad.output and "must not answer" in bad.output
    none = CliRunner().invoke(command, ["--model", str(folder / "nothing"), "--json"])
    assert none.exit_code == 1 and "no model folder" in json.loads(none.output)["problem"]
