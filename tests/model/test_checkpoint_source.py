"""What an import refuses, each with one sentence and nothing left behind, and how much memory it takes."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoints
from model.checkpoint_keys import canonical, canonical_tower, lora_part, on_disk
from model.checkpoint_source import CheckpointError
from model.checkpoints import import_checkpoint
from tests.model import originals

MIB = 2**20


@pytest.fixture(scope="module")
def made() -> originals.Original:
    return originals.original()


@pytest.fixture
def tower(made: Any, tmp_path: Path) -> Path:
    return originals.write_tower(made, tmp_path / "tower")


def refused(src: Path, match: str, **options: Any) -> None:
    out = src.parent / "out"
    with pytest.raises(CheckpointError, match=match) as error:
        import_checkpoint(src, out, **options)
    assert len(str(error.value).splitlines()) == 1
    assert not out.exists() and not list(src.parent.glob(".out*")), "nothing is left behind"


def test_a_key_without_a_place_is_named(made: Any, tower: Path, tmp_path: Path) -> None:
    src = originals.write_original(made, tmp_path / "src")
    originals.write_state(made.state() | {"model.vision_resampler.query": torch.ones(2)}, src, "safetensors")
    refused(src, "1 weights that have no place, first model.vision_resampler.query", tower=tower)


def test_a_missing_weight_is_named(made: Any, tower: Path, tmp_path: Path) -> None:
    src = originals.write_original(made, tmp_path / "src")
    state = made.state()
    del state["model.layers.1.mlp.up_proj.weight"]
    originals.write_state(state, src, "safetensors")
    refused(src, r"lacks 1 weights, first model\.language_model\.layers\.1\.mlp\.up_proj", tower=tower)


def test_a_tower_of_another_shape_is_named(made: Any, tower: Path, tmp_path: Path) -> None:
    src = originals.write_original(made, tmp_path / "src")
    config = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    refused(src, r"--tower", tower=tower)


def test_a_tower_that_is_not_here_is_asked_for(made: Any, tower: Path, tmp_path: Path) -> None:
    src = originals.write_original(made, tmp_path / "src", tower=False)
    refused(src, r"somebody/some-tower is not here: fetch it and pass its folder as --tower")
    (tower / "model.safetensors").unlink()
    refused(src, r"fetch them and pass --tower", tower=tower)
    refused(src, r"holds no weights of a vision tower", tower=tower, tower_weights="checkpoint")


def test_what_is_no_checkpoint_is_refused(made: Any, tower: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "holds no weights", tower=tower)
    refused(tmp_path / "absent", "is no folder", tower=tower)
    src = originals.write_original(made, tmp_path / "src")
    (src / "config.json").write_text(json.dumps(made.config | {"model_type": "bunny"}))
    refused(src, "of type bunny", tower=tower)
    (src / "config.json").write_text(json.dumps(made.config | {"mm_projector_type": "linear"}))
    refused(src, "type linear", tower=tower)
    (src / "config.json").write_text("{")
    refused(src, "no readable JSON", tower=tower)


def test_a_missing_shard_and_a_damaged_one_are_named(made: Any, tower: Path, tmp_path: Path) -> None:
    src = originals.write_original(made, tmp_path / "src", shards=3)
    shard = src / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(src, "model-00002-of-00003.safetensors cannot be read", tower=tower)
    shard.unlink()
    refused(src, "lacks model-00002-of-00003.safetensors", tower=tower)


class Touch:
    """Unpickling an object of this class would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_a_bin_file_cannot_run_anything(made: Any, tower: Path, tmp_path: Path) -> None:
    src = originals.write_original(made, tmp_path / "src")
    (src / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Touch(tmp_path / "ran")}, src / "pytorch_model.bin")
    refused(src, "cannot be read as weights", tower=tower)
    (src / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran"), protocol=2))
    refused(src, "cannot be read as weights", tower=tower)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_is_noticed_first_and_an_error_leaves_nothing(
    made: Any, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = originals.write_original(made, tmp_path / "src")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
        refused(src, "GiB free", tower=tower)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", full)
        refused(src, "No space left", tower=tower)
    assert import_checkpoint(src, tmp_path / "out", tower=tower).parameters > 0
    with pytest.raises(CheckpointError, match="there already"):
        import_checkpoint(src, tmp_path / "out", tower=tower)


def test_a_lora_folder_needs_the_right_base(made: Any, tower: Path, tmp_path: Path) -> None:
    src, base = tmp_path / "src", originals.write_original(made, tmp_path / "base")
    src.mkdir()
    (src / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    torch.save(
        {f"{stem}_A.weight": torch.ones(2, 32), f"{stem}_B.weight": torch.ones(64, 2)}, src / "adapter_model.bin"
    )
    refused(src, "give the model it was trained on with --base", tower=tower)
    refused(src, "does not fit", tower=tower, base=base)
    torch.save({f"{stem}_A.weight": torch.ones(2, 64)}, src / "adapter_model.bin")
    refused(src, "a factor or the weight itself is missing", tower=tower, base=base)


def test_names_of_every_spelling_meet() -> None:
    layer, tower = "model.language_model.layers.3.mlp.up_proj.weight", "model.vision_tower.post_layernorm.bias"
    for key in ("model.layers.3.", "language_model.model.layers.3.", "base_model.model.model.layers.3."):
        assert canonical(f"{key}mlp.up_proj.weight") == layer
    for key in ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model.", "vision_tower."):
        assert canonical(f"{key}post_layernorm.bias") == tower
    assert canonical_tower("vision_model.post_layernorm.bias") == canonical_tower("post_layernorm.bias") == tower
    assert canonical("model.mm_projector.2.bias") == "model.multi_modal_projector.linear_2.bias"
    assert canonical("model.mm_projector.weight") is None, "a linear projector has no place"
    key = "base_model.model.model.layers.3.mlp.up_proj.lora_B.default.weight"
    assert lora_part(key) == (layer, "B") and lora_part(layer) is None
    assert on_disk(layer) == "language_model.model.layers.3.mlp.up_proj.weight"


MEASURE = """
import json, resource, sys
from pathlib import Path
import torch, transformers
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from model import checkpoints, memory
src, out, tower = map(Path, sys.argv[1:])
began = memory.highest_resident_bytes()
report = checkpoints.import_checkpoint(src, out, tower=tower)
print(json.dumps([began, memory.highest_resident_bytes(), report.bytes]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_memory_stays_far_below_the_size_of_the_model(tmp_path: Path, kind: str) -> None:
    """600 MB in shards of 100 MB: above one shard the import may take 100 MB, of which a 7B model has 2 GiB."""
    made = originals.original()
    wide = {"hidden_size": 64, "intermediate_size": 65536, "num_hidden_layers": 12}
    src, tower = tmp_path / "src", originals.write_tower(made, tmp_path / "tower")
    originals.write_original(made, src)
    (src / "model.safetensors").unlink()
    (src / "config.json").write_text(json.dumps(made.config | wide))
    state = {k: v for k, v in made.state().items() if ".layers." not in k or "vision" in k}
    like = {k: v for k, v in made.state().items() if k.startswith("model.layers.0.")}
    shapes = {"gate_proj": (65536, 64), "up_proj": (65536, 64), "down_proj": (64, 65536)}
    for layer in range(12):
        for key, value in like.items():
            shape = next((s for name, s in shapes.items() if name in key), value.shape)
            state[key.replace("layers.0.", f"layers.{layer}.")] = torch.randn(shape)
    originals.write_state(state, src, kind, 6)
    weights = [p for p in src.iterdir() if p.suffix == f".{kind}"]
    shard, whole = max(p.stat().st_size for p in weights), sum(p.stat().st_size for p in weights)
    assert whole > 570 * MIB and shard < 120 * MIB
    command = [sys.executable, "-c", MEASURE, str(src), str(tmp_path / "out"), str(tower)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    began, peak, size = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{kind}: model {size / MIB:.0f} MiB, shard {shard / MIB:.0f} MiB, peak above start {(peak - began) / MIB:.0f}"
    )
    assert size > 570 * MIB and peak - began < shard + 100 * MIB
