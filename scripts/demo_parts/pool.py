"""Runs the demo's jobs side by side, one per core, under one progress bar, and leaves no process behind.

Not here: what a job does (`job`), and the federation's own processes (`scripts.federation`).
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.demo_parts.job import Job
from scripts.demo_parts.plan import DemoFailed

MARK = "AFYA_DEMO_RUN"  # in the environment of everything that a run starts: what is left of it can be found and ended
Progress = Callable[[float], None]


def side_by_side() -> int:
    """How many jobs run at once: one per core that this process may use, at most four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores))


def run_jobs(jobs: Sequence[Job], progress: Progress, workers: int | None = None) -> dict[str, dict[str, Any]]:
    """Run all jobs, longest first as given; returns each one's result by name. `progress` gets the share done, 0..1.

    Raises DemoFailed with the last lines of the log of the first job that failed; the others are ended.
    """
    waiting, shares = list(jobs), {job.name: 0.0 for job in jobs}
    running: list[tuple[Job, subprocess.Popen[str]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < (workers or side_by_side()):
                job = waiting.pop(0)
                running.append((job, _start(job, shares)))
            time.sleep(0.1)
            progress(sum(shares.values()) / len(shares))
            for job, child in list(running):
                if child.poll() is not None:
                    running.remove((job, child))
                    _check(job, child)
                    shares[job.name] = 1.0
    finally:
        for _, child in running:
            child.kill()
            child.wait()
    progress(1.0)
    return {job.name: json.loads((Path(job.folder) / "result.json").read_bytes()) for job in jobs}


def _start(job: Job, shares: dict[str, float]) -> "subprocess.Popen[str]":
    path = job.write()
    with open(path.with_name("log.txt"), "w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "scripts.demo_parts.job", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    threading.Thread(target=_listen, args=(job, child, shares), daemon=True).start()
    return child


def _listen(job: Job, child: "subprocess.Popen[str]", shares: dict[str, float]) -> None:
    """Turn a job's progress lines into its share: of a job that trains, answering is the last fifth."""
    assert child.stdout is not None
    training = 0.8 if job.train else 0.0
    with child.stdout as lines:
        for line in lines:
            try:
                said = json.loads(line)
                share = said["done"] / max(1, said["total"])
            except (ValueError, KeyError, TypeError):  # a library's own line
                continue
            shares[job.name] = share * training if said["what"] == "trains" else training + share * (1 - training)


def _check(job: Job, child: "subprocess.Popen[str]") -> None:
    if child.returncode:
        log = Path(job.folder) / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise DemoFailed(f"The job {job.name!r} failed ({lines[-1] if lines else 'no words'}); its log is {log}.")


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Mark everything started inside, and end on leaving whatever of it still runs, however it was started."""
    os.environ[MARK] = uuid.uuid4().hex
    try:
        yield
    finally:
        end_marked(os.environ.pop(MARK))


def end_marked(mark: str) -> int:
    """End every process of this user that carries the mark, but not this one; returns how many there were."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(found, timeout=5)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return len(found)
