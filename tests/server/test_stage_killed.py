"""Stages that are killed and resumed, and one that is split among processes: the losses of the uninterrupted run."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.server.stages import ROOT, command, env, losses, run


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
