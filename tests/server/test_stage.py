"""The three stages through the command, at tiny size on the CPU: chained, chosen, refused.

Rows are made from synthetic radiographs; where the open data is present a chain also runs on real SLAKE rows.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.server.stages import losses, run


def test_three_stages_each_from_the_last(base: Path, rows: Path, tmp_path: Path) -> None:
    start = base
    wanted = {"alignment": "projector", "instruction": "all", "downstream": "llm+projector"}
    for name, trainable in wanted.items():
        board = name == "alignment"  # it takes as long to import as the stage
        done = run(name, start, rows, tmp_path / name, stage__trainable=trainable, log__tensorboard=str(board).lower())
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"Trains {trainable}:" in done.stdout and "25 of 25 rows read" in done.stdout
        out, start = tmp_path / name, tmp_path / name / "model"
        assert len(losses(out)) == 14 and (out / "loss.png").stat().st_size > 1000
        assert (out / "tensorboard").is_dir() == board
        config = json.loads((out / "config.json").read_text())
        assert config["recipe"]["stage"]["trainable"] == trainable and config["rows"] == 25
        kept = sorted(p.name for p in (out / "checkpoints").iterdir() if p.is_dir())
        assert kept == ["step-0000009", "step-0000012"], "the last two"
    first, last = losses(tmp_path / "alignment"), losses(tmp_path / "downstream")
    assert sum(last[-4:]) < 0.7 * sum(first[:4]), "three stages have learnt something"


def test_only_what_is_chosen_changes(base: Path, rows: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    assert run("alignment", base, rows, tmp_path, optim__epochs=1, stage__trainable="projector").returncode == 0
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed and all("multi_modal_projector" in name for name in changed)


def test_a_lora_stage_gives_an_adapter_and_the_same_merged_model(base: Path, rows: Path, tmp_path: Path) -> None:
    import numpy as np

    from model import llava
    from model.backends import Request, TorchBackend

    done = run("downstream", base, rows, tmp_path, stage__trainable="lora", stage__lora_rank=4, stage__lora_dropout=0.1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "lora" in done.stdout
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    found = []
    for backend in (TorchBackend(base, 32, tmp_path / "adapter", "cpu"), TorchBackend(tmp_path / "model", 32)):
        items = backend.generate([Request(picture, "What?")])
        found.append(next(item[1] for item in items if isinstance(item, tuple)))
    assert found[0].text == found[1].text
    assert found[0].confidence == pytest.approx(found[1].confidence, rel=1e-3)
    assert llava.base_sha256(base) != llava.base_sha256(tmp_path / "model")


def test_what_stands_in_the_way_is_told_at_once_and_nothing_is_started(base: Path, rows: Path, tmp_path: Path) -> None:
    lost = tmp_path / "rows.json"
    shutil.copy(rows, lost)  # without its pictures
    done = run("downstream", base, lost, tmp_path / "out")
    assert done.returncode == 1 and "Error: Nothing was started: " in done.stderr and "--images" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run("downstream", tmp_path, rows, tmp_path / "out")
    assert done.returncode == 1 and "holds no config.json" in done.stderr
    done = run("downstream", base, rows, tmp_path / "out", stage__trainable="tower", optim__lr=0)
    assert done.returncode == 1 and "stage.trainable must be one of" in done.stderr
    assert "optim.lr must be" in done.stderr


def test_a_loss_that_does_not_fall_stops_the_run(base: Path, rows: Path, tmp_path: Path) -> None:
    done = run("downstream", base, rows, tmp_path / "out", optim__lr=1e-12, watch__after=8, watch__window=4)
    assert done.returncode == 1 and "The loss does not fall" in done.stderr
    assert (tmp_path / "out/loss.png").exists() and not (tmp_path / "out/model").exists()


def test_a_chain_on_real_slake_rows(base: Path, shared: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from server.data_cli import data

    built = CliRunner().invoke(
        data, ["build", "--slake", str(shared / "data/slake"), "--images", str(shared / "data"), "--out", str(tmp_path)]
    )
    assert built.exit_code == 0, built.output
    some = tmp_path / "some.json"
    some.write_text(json.dumps(json.loads((tmp_path / "slake_train.json").read_text())[:48]))
    start, seen = base, []
    for name in ("alignment", "instruction", "downstream"):
        done = run(name, start, some, tmp_path / name, "--images", str(shared / "data"), optim__epochs=3)
        assert done.returncode == 0, done.stderr[-2000:]
        start = tmp_path / name / "model"
        seen.append(losses(tmp_path / name))
    assert sum(seen[2][-5:]) < 0.8 * sum(seen[0][:5])
