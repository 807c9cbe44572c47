"""The three stages through the command, at tiny size on the CPU: chained, killed and resumed, split by ZeRO, refused.

Rows are made from synthetic radiographs; where the open data is present a chain also runs on real SLAKE rows.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
FAST = {
    "optim.batch": 4, "optim.accumulation": 1, "optim.lr": 2e-3, "optim.epochs": 2, "engine.precision": "fp32",
    "engine.workers": 0, "engine.length_multiple": 1, "log.tensorboard": "false", "checkpoint.steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations of one or two turns about 12 synthetic pictures, and one without a picture."""
    from PIL import Image

    from model import phantoms

    folder = tmp_path_factory.mktemp("rows")
    names = [name for name, scanner in phantoms.SCANNERS.items() if scanner.standard]
    samples = phantoms.make(12, names, seed=5)
    made: list[dict[str, Any]] = [{"id": "text", "conversations": turns("Say yes.", "yes")}]
    for number, sample in enumerate(samples[:24]):
        name = f"{sample.group.replace('/', '_')}.png"
        Image.fromarray(sample.image).save(folder / name)
        said = turns(f"<image>\n{sample.question}", sample.answer)
        said += turns("Sure?", "yes") if number % 3 == 0 else []
        made.append({"id": number, "image": name, "conversations": said})
    (folder / "rows.json").write_text(json.dumps(made), encoding="utf-8")
    return folder / "rows.json"


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "model")


def command(recipe: str, start: Path, data: Path, out: Path, *extra: str, **sets: object) -> list[str]:
    line = [sys.executable, "-c", "from server.cli import main; main()", "train"]
    line += ["--recipe", str(ROOT / f"server/recipes/{recipe}.toml"), "--model", str(start), "--data", str(data)]
    line += ["--out", str(out), *extra]
    for key, value in {**FAST, **{k.replace("__", "."): v for k, v in sets.items()}}.items():
        line += ["--set", f"{key}={value}"]
    return line


def env() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run(*line: Any, **sets: object) -> subprocess.CompletedProcess[str]:
    done = command(*line, **sets)
    return subprocess.run(done, cwd=ROOT, env=env(), capture_output=True, text=True, timeout=400, check=False)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_three_stages_each_from_the_last(base: Path, rows: Path, tmp_path: Path) -> None:
    start = base
    wanted = {"alignment": "projector", "instruction": "all", "downstream": "llm+projector"}
    for name, trainable in wanted.items():
        done = run(name, start, rows, tmp_path / name, stage__trainable=trainable, log__tensorboard="true")
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"Trains {trainable}:" in done.stdout and "25 of 25 rows read" in done.stdout
        out, start = tmp_path / name, tmp_path / name / "model"
        assert len(losses(out)) == 14 and (out / "loss.png").stat().st_size > 1000
        assert any((out / "tensorboard").iterdir())
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


@pytest.mark.parametrize(("precision", "kills"), [("fp32", (1, 4, 11)), ("bf16", (5,))])
def test_killed_at_any_step_and_resumed_it_is_the_uninterrupted_run(
    base: Path, rows: Path, tmp_path: Path, precision: str, kills: tuple[int, ...]
) -> None:
    options = {"optim__accumulation": 2, "stage__trainable": "lora", "stage__lora_dropout": 0.3, "optim__epochs": 5}
    options["engine__precision"] = precision
    whole = tmp_path / "whole"
    assert run("downstream", base, rows, whole, **options).returncode == 0
    for number, kill_at in enumerate(kills):  # before the first checkpoint, after it, later
        out = tmp_path / f"killed-{number}"
        process = subprocess.Popen(
            command("downstream", base, rows, out, **options), cwd=ROOT, env=env(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for_step(out, kill_at, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if number == len(kills) - 1:  # a save that was cut off
            (out / "checkpoints/.step-0000099.partial").mkdir(parents=True, exist_ok=True)
        done = run("downstream", base, rows, out, "--resume", **options)
        assert done.returncode == 0, done.stderr[-2000:]
        assert losses(out) == pytest.approx(losses(whole), abs=1e-6 if precision == "fp32" else 1e-3)
        assert not list((out / "checkpoints").glob(".*"))


def wait_for_step(out: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(4000):
        if (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) >= step:
            return
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    raise AssertionError("no step was reached")


def test_two_processes_by_hostfile_under_zero_3_learn_what_one_does(base: Path, rows: Path, tmp_path: Path) -> None:
    one = run("downstream", base, rows, tmp_path / "one", optim__accumulation=2, engine__zero_stage=1)
    assert one.returncode == 0, one.stderr[-2000:]
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    options = ("--hostfile", str(tmp_path / "hosts"))
    two = run("downstream", base, rows, tmp_path / "two", *options, engine__zero_stage=3)
    assert two.returncode == 0, two.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    from safetensors.numpy import load_file

    found = [load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two")]
    assert max(abs(found[0][name] - found[1][name]).max() for name in found[0]) < 1e-4


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
