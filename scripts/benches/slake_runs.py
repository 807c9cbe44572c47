"""Runs the cases of `scripts/bench slake` and `liars` side by side, a process for each, and keeps what they find."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from scripts.benches.slake_case import Case


def run_all(wanted: Sequence[Case], workers: int, minutes: float | None, *options: str) -> None:
    """Do what is not done yet, `workers` at a time; `options` are those of `slake_case`.

    Raises ClickException at the end with the cases that failed.
    """
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    waiting = [case for case in wanted if not done(case)]
    running: list[tuple[Case, subprocess.Popen[bytes]]] = []
    failed: list[Case] = []
    gpus = itertools.cycle(_gpus())
    with tqdm(total=len(wanted), initial=len(wanted) - len(waiting), unit="case", desc="training") as bar:
        try:
            while running or (waiting and time.monotonic() < end):
                while waiting and len(running) < workers and time.monotonic() < end:
                    running.append((waiting[0], _start(waiting.pop(0), next(gpus), *options)))
                time.sleep(0.2)
                for case, child in list(running):
                    if child.poll() is not None:
                        running.remove((case, child))
                        failed += [case] if child.returncode else []
                        bar.update()
        finally:
            for _, child in running:
                child.kill()
                child.wait()
    if failed:
        raise click.ClickException(f"{len(failed)} cases failed; the first one's log is {_log(failed[0])}.")


def _gpus() -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is to be for one case after the other; None leaves it as it is."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [*named.split(",")] if count > 1 else [None]


def done(case: Case) -> bool:
    """Whether a case has a result of these settings. Raises ClickException for one of others."""
    if not Path(case.out).exists():
        return False
    found = result(case)
    settings = case.settings if case.what != "none" else found["settings"]  # no training: whatever the settings were
    if (found["settings"], found["base"], found["data"]) != (settings, case.base, case.data):
        raise click.ClickException(f"{case.out} was made with other settings, base or data; choose another --out.")
    return True


def _log(case: Case) -> Path:
    return Path(case.out).with_suffix(".log")


def _start(case: Case, gpu: str | None, *options: str) -> "subprocess.Popen[bytes]":
    plan = Path(case.out).with_suffix(".case")
    plan.write_text(json.dumps(asdict(case)), encoding="utf-8")
    command = [sys.executable, "-m", "scripts.benches.slake_case", str(plan), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    with _log(case).open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def result(case: Case) -> dict[str, Any]:
    """What a case that is done has found."""
    found: dict[str, Any] = json.loads(Path(case.out).read_bytes())
    return found
