"""Stages of training as tests run them: the command at tiny size on one thread of the CPU, and its losses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FAST = {
    "optim.batch": 4, "optim.accumulation": 1, "optim.lr": 2e-3, "optim.epochs": 2, "engine.precision": "fp32",
    "engine.workers": 0, "engine.length_multiple": 1, "log.tensorboard": "false", "checkpoint.steps": 3,
}  # fmt: skip


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
