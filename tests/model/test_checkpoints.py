"""Imported checkpoints answer as their parts run one by one, from every format that training and publishing leave."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from model import llava
from model.checkpoint_source import CheckpointError
from model.checkpoints import import_checkpoint
from tests.model import originals

PROMPT = [1, 5, 9, -200, 33, 70, 41]
LIMIT = 1e-4  # largest difference of a logit, float32 on a CPU


def gap(folder: Path, made: originals.Original) -> float:
    """Largest logit difference between an imported folder and the parts it was made of."""
    core = originals.network(folder)
    pixels = torch.randn(1, 3, originals.SIDE, originals.SIDE, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([originals.image_ids(PROMPT, core)])
    with torch.no_grad():
        ours = core(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0]
        theirs = made.logits(PROMPT, pixels)
    assert theirs.std() > 1, "the test is only worth something if logits differ"
    return float((ours[:, : theirs.shape[1]] - theirs).abs().max())


@pytest.fixture(scope="module")
def siglip() -> originals.Original:
    return originals.original()


@pytest.mark.parametrize(("kind", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)])
def test_every_kind_of_weight_file(siglip: Any, tmp_path: Path, kind: str, shards: int) -> None:
    src = originals.write_original(siglip, tmp_path / "src", kind=kind, shards=shards)
    report = import_checkpoint(src, tmp_path / "out", tower=originals.write_tower(siglip, tmp_path / "tower"))
    assert gap(report.out, siglip) < LIMIT
    assert report.tower_different == 0 and not report.notes
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in report.dropped


def test_a_bin_file_of_the_old_layout(siglip: Any, tmp_path: Path) -> None:
    src = originals.write_original(siglip, tmp_path / "src")
    (src / "model.safetensors").unlink()
    torch.save(siglip.state(), src / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    report = import_checkpoint(src, tmp_path / "out", tower=originals.write_tower(siglip, tmp_path / "tower"))
    assert gap(report.out, siglip) < LIMIT


def test_the_tower_comes_from_its_folder_when_the_checkpoint_has_none(siglip: Any, tmp_path: Path) -> None:
    src = originals.write_original(siglip, tmp_path / "src", tower=False)
    tower = originals.write_tower(siglip, tmp_path / "tower")
    report = import_checkpoint(src, tmp_path / "out", tower=tower)
    assert report.tower_weights == "tower" and gap(report.out, siglip) < LIMIT


def test_llava_med_with_mistral_and_clip(shared: Path, tmp_path: Path) -> None:
    source = shared / "vectors" / "tokenizers" / "mistral" / "tokenizer.json"
    if not source.is_file():
        pytest.skip("the published tokenizers are not here: shared/vectors/tokenizers")
    made = originals.original(clip=True, mistral=True, rows=32000, seed=1)
    src = originals.write_original(made, tmp_path / "src", shards=4)
    shutil.copyfile(source, src / "tokenizer.json")
    report = import_checkpoint(src, tmp_path / "out", tower=originals.write_tower(made, tmp_path / "tower"))
    config = json.loads((report.out / "config.json").read_text())
    assert (report.template, report.image_tokens, report.image_token_id) == ("mistral_instruct", 4, 32000)
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "default")
    assert config["text_config"]["sliding_window"] is None
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 1e6
    assert gap(report.out, made) < LIMIT
    picture = Image.new("RGB", (30, 60), (200, 0, 0))
    found = llava.load(report.out, 32, device="cpu").processor(text="<image> what?", images=picture)
    assert found["input_ids"][0].count(32000) == 4


def test_a_projector_on_its_base(siglip: Any, tmp_path: Path) -> None:
    base = originals.write_original(originals.original(seed=5), tmp_path / "base")
    src = tmp_path / "src"
    src.mkdir()
    (src / "config.json").write_text(json.dumps(siglip.config))
    new = {f"model.mm_projector.{k}": v for k, v in siglip.projector.state_dict().items()}
    torch.save(new, src / "mm_projector.bin")
    tower = originals.write_tower(siglip, tmp_path / "tower")
    with pytest.raises(CheckpointError, match="--base"):
        import_checkpoint(src, tmp_path / "out", tower=tower)
    report = import_checkpoint(src, tmp_path / "out", tower=tower, base=base)
    mixed = originals.original(seed=5)
    mixed.projector = siglip.projector
    assert gap(report.out, mixed) < LIMIT


@pytest.mark.parametrize("file", ["bin", "safetensors"])
def test_lora_factors_are_merged(siglip: Any, tmp_path: Path, file: str) -> None:
    from peft import LoraConfig, get_peft_model

    base = originals.write_original(siglip, tmp_path / "base")
    made = originals.original()
    options = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 3})
    wrapped = get_peft_model(made.decoder, options)
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    src = tmp_path / "src"
    wrapped.save_pretrained(src, safe_serialization=file == "safetensors")
    made.decoder = wrapped.merge_and_unload().eval()
    rest = {f"base_model.model.model.mm_projector.{k}": v + 0.1 for k, v in made.projector.state_dict().items()}
    torch.save(rest, src / "non_lora_trainables.bin")
    made.projector.load_state_dict({k: v + 0.1 for k, v in made.projector.state_dict().items()})
    (src / "config.json").write_text(json.dumps(made.config))
    report = import_checkpoint(src, tmp_path / "out", tower=originals.write_tower(made, tmp_path / "tower"), base=base)
    assert report.merged == 4 and gap(report.out, made) < LIMIT
    # on a base that was imported before, the same
    whole = import_checkpoint(base, tmp_path / "whole", tower=tmp_path / "tower")
    again = import_checkpoint(src, tmp_path / "again", base=whole.out)
    assert gap(again.out, made) < LIMIT


def test_a_tuned_tower_in_its_own_sub_folder(siglip: Any, tmp_path: Path) -> None:
    src = originals.write_original(siglip, tmp_path / "src", tower=False)
    originals.write_tower(siglip, src / "vision_tower")
    (src / "vision_tower" / "model.safetensors").unlink()
    torch.save(siglip.tower_state(), src / "vision_tower" / "pytorch_model.bin")
    report = import_checkpoint(src, tmp_path / "out")
    assert report.tower_weights == "checkpoint" and gap(report.out, siglip) < LIMIT


@pytest.mark.parametrize("older", [False, True])
def test_a_converted_folder_is_copied(siglip: Any, tmp_path: Path, older: bool) -> None:
    from safetensors.torch import load_file, save_file

    src = originals.write_original(siglip, tmp_path / "src")
    first = import_checkpoint(src, tmp_path / "first", tower=originals.write_tower(siglip, tmp_path / "tower"))
    if older:
        state = load_file(first.out / "model.safetensors")
        state = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in state.items()}
        save_file(state, first.out / "model.safetensors", metadata={"format": "pt"})
    second = import_checkpoint(first.out, tmp_path / "second")
    assert gap(second.out, siglip) < LIMIT
    assert (second.template, second.image_token_id) == (first.template, first.image_token_id)
    same = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json")
    assert all((first.out / name).read_bytes() == (second.out / name).read_bytes() for name in same)


def test_the_reference_model_is_copied_as_it_is(tiny: Path, tmp_path: Path) -> None:
    report = import_checkpoint(tiny, tmp_path / "out")
    assert report.template == "afya"
    ours, theirs = originals.network(report.out).state_dict(), originals.network(tiny).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_can_be_written_in_another_type(siglip: Any, tmp_path: Path, dtype: str) -> None:
    src = originals.write_original(siglip, tmp_path / "src")
    tower = originals.write_tower(siglip, tmp_path / "tower")
    report = import_checkpoint(src, tmp_path / "out", tower=tower, dtype=dtype)
    assert report.bytes == 2 * report.parameters
    assert originals.network(report.out).config.dtype is torch.float32  # loaded at 32 bits
    assert gap(report.out, siglip) < 0.5


@pytest.mark.parametrize("bits", llava.BITS)
def test_an_import_loads_at_every_precision(siglip: Any, tmp_path: Path, bits: int) -> None:
    src = originals.write_original(siglip, tmp_path / "src")
    report = import_checkpoint(src, tmp_path / "out", tower=originals.write_tower(siglip, tmp_path / "tower"))
    loaded = llava.load(report.out, bits, device="cpu")
    kinds = {name: type(layer).__name__ for name, layer in loaded.core.named_modules() if "Linear" in str(type(layer))}
    for name in ("up_proj", "down_proj"):  # the latter's 96 inputs do not fit the packed kernel of a CPU
        kind = kinds[f"model.language_model.layers.0.mlp.{name}"]
        assert kind == {8: "Linear8bitLt", 4: "Linear4bit"}.get(bits, "Linear")
    ids = torch.tensor([originals.image_ids(PROMPT, loaded.core)])
    pixels = torch.zeros(1, 3, originals.SIDE, originals.SIDE, dtype=loaded.core.dtype)
    answer = loaded.core.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > ids.shape[1]
