"""Central training through the command: DeepSpeed with ZeRO on two CPU processes, resume, outputs, what is kept unseen.

Sizes are tiny; the data are synthetic radiographs, so nothing outside the repository is needed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.data import Sample
from server import recipe, train_data
from server.recipe import DataConfig, Source

ROOT = Path(__file__).parents[2]
TINY = {
    "model.image_size": 32,
    "model.tower_layers": 1,
    "model.tower_hidden": 64,
    "model.tower_heads": 2,
    "model.tower_mlp": 64,
    "model.decoder_layers": 1,
    "model.decoder_hidden": 64,
    "model.decoder_heads": 2,
    "model.decoder_mlp": 64,
    "model.vocabulary": 400,
    "data.sources": "[]",
    "data.exclude_images_of": "[]",
    "data.validate": "''",
    "data.phantom_images": 24,
    "data.phantom_parts": 1,
    "optim.batch": 8,
    "optim.epochs": 4,
    "optim.checkpoint_epochs": 2,
    "optim.lr": 3e-3,
    "optim.ema": 0.5,
    "engine.zero_stage": 2,
    "engine.precision": "fp32",
    "engine.length_multiple": 1,
}


def run(out: Path, *extra: str, **sets: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from server.cli import main; main()", "train"]
    command += ["--recipe", str(ROOT / "server/recipes/reference.toml")]
    command += ["--data", str(out.parent), "--out", str(out), *extra]
    for key, value in {**TINY, **sets}.items():
        command += ["--set", f"{key}={value}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_two_processes_train_resume_exactly_and_leave_everything_beside_the_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "--processes", "2")
    assert whole.returncode == 0, whole.stderr[-2000:]
    part = run(tmp_path / "part", "--processes", "2", "--minutes", "0")
    assert "go on with --resume" in part.stderr + part.stdout
    assert len(losses(tmp_path / "part")) == 1
    assert run(tmp_path / "part", "--processes", "2", "--resume").returncode == 0
    assert losses(tmp_path / "part") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    assert losses(tmp_path / "whole")[-1] < 0.8 * losses(tmp_path / "whole")[0]
    for name in ("config.json", "loss.png", "model/training.json", "model/model.safetensors", "checkpoints/latest"):
        assert (tmp_path / "whole" / name).exists(), name
    refused = run(tmp_path / "whole", "--processes", "2")
    assert refused.returncode == 1
    assert "--resume" in refused.stderr


@pytest.mark.slow
def test_one_process_goes_on_from_a_model_and_the_result_answers(tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    start = tiny_model(tmp_path / "start")
    done = run(tmp_path / "next", "--model", str(start), **{"optim.epochs": 1, "engine.zero_stage": 1})
    assert done.returncode == 0, done.stderr[-2000:]
    from transformers import AutoModelForImageTextToText, AutoProcessor

    AutoModelForImageTextToText.from_pretrained(tmp_path / "next" / "model")
    kept = AutoProcessor.from_pretrained(tmp_path / "next" / "model").tokenizer.get_vocab()
    assert kept == AutoProcessor.from_pretrained(start).tokenizer.get_vocab()


@pytest.mark.slow
def test_bf16_is_really_in_effect_inside_the_engine(tmp_path: Path) -> None:
    """DeepSpeed switches an autocast around its engine off, silently: the losses would be those of fp32."""
    seen = {}
    for precision in ("fp32", "bf16"):
        sets = {"optim.epochs": 1, "engine.zero_stage": 0, "engine.precision": precision}
        assert run(tmp_path / precision, **sets).returncode == 0
        seen[precision] = losses(tmp_path / precision)[0]
    assert seen["bf16"] != seen["fp32"]
    assert seen["bf16"] == pytest.approx(seen["fp32"], rel=0.02)


def test_a_wrong_recipe_is_one_sentence_and_nothing_is_written(tmp_path: Path) -> None:
    done = run(tmp_path / "o", **{"optim.epocs": 3})
    assert done.returncode == 1
    assert "unknown key optim.epocs" in done.stderr
    assert not (tmp_path / "o").exists()


def test_excluded_and_held_out_images_never_reach_training(shared: Path) -> None:
    loaded = recipe.load(ROOT / "server/recipes/reference.toml", ["data.phantom_images=0", "data.hold_out=0.5"])
    chosen = train_data.gather(loaded.data, shared / "data")
    from model.data import read

    validate = {row.group for row in read(shared / "data/slake/en_validate.json")}
    groups = {sample.group for sample in chosen}
    assert not groups & validate
    assert len([g for g in groups if g.startswith("slake/")]) == 225
    leaky = DataConfig(
        sources=(Source("slake/en_validate.json", "slake/imgs"), Source("vqa_rad/train.json", "vqa_rad/images")),
        exclude_images_of=("slake/en_validate.json",),
    )
    assert all(sample.source == "vqa-rad" for sample in train_data.gather(leaky, shared / "data"))


def test_mirrored_exchanges_sides_in_picture_and_words() -> None:
    import numpy as np

    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    rows = [
        Sample("1", picture, "Is the Left lung left of it?", "Right, bright", "open", "g", "t"),
        Sample("2", picture, "Nodule?", "No", "closed", "g", "t"),
    ]
    first, second = train_data.mirrored(rows)
    assert (first.question, first.answer) == ("Is the Right lung right of it?", "Left, bright")
    assert np.array_equal(first.image, picture[:, ::-1])
    assert first.image is second.image
    assert train_data.mirrored([first])[0].question == rows[0].question
