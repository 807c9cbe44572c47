"""The demo from beginning to end: clinics, federation, comparison, report, kiosk. `scripts/demo` starts it.

Everything is real: cases in each clinic's kiosk database, training on what they consented to, Flower's Deployment
Engine over TLS with registered keys, answers at 4 bits. All of it runs on this computer, under one folder.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.demo_parts import flow
from scripts.demo_parts.plan import DemoFailed, Plan
from scripts.demo_parts.pool import nothing_left_behind
from scripts.demo_parts.stages import Stages, clock, say

MARKER = ".afya-demo"  # in a folder that a demo made, and that a later one may therefore clear
STAGES = 6


def parse(arguments: Sequence[str]) -> Plan:
    """The plan that the command line asks for. Exits with 2 for a wrong one, raises DemoFailed for a missing model."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Three clinics improve one model together.")
    parser.add_argument("--no-kiosk", action="store_true", help="end after the report")
    parser.add_argument("--out", type=Path, default=Path("demo-report"), metavar="DIR")
    parser.add_argument("--rounds", type=int, metavar="N", help="federated rounds")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of a clinic in each round")
    parser.add_argument("--data", type=Path, metavar="DIR", help="SLAKE: clinics by modality on real images")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="MODEL",
        help="the model all start from (default: the reference model; with --data one that saw few of them)",
    )
    chosen = parser.parse_args(arguments)
    if chosen.rounds is not None and not 1 <= chosen.rounds <= 200:
        parser.error("--rounds is between 1 and 200")
    if chosen.steps is not None and not 8 <= chosen.steps <= 500:
        parser.error("--steps is between 8 and 500, as the clinics' limits say")
    if chosen.data is not None and not (chosen.data / "en_train.json").is_file():
        parser.error(f"{chosen.data} holds no en_train.json; give the folder of SLAKE")
    base = (chosen.base or _reference("reference-few" if chosen.data else "reference")).resolve()
    if not (base / "config.json").is_file():
        parser.error(f"{base} is no model folder (config.json is missing)")
    plan = Plan(base, chosen.out.resolve(), chosen.data.resolve() if chosen.data else None, not chosen.no_kiosk)
    changes = {"rounds": chosen.rounds, "local_steps": chosen.steps}
    return dataclasses.replace(plan, **{name: value for name, value in changes.items() if value is not None})


def _reference(name: str) -> Path:
    from model.presets import PresetMissing, reference_path

    try:
        return reference_path(name)
    except PresetMissing as error:
        raise DemoFailed(str(error)) from error


@contextlib.contextmanager
def own_folder(plan: Plan) -> Iterator[None]:
    """The output folder, cleared of an earlier run's work and locked; the earlier report stays until the new one."""
    out = plan.out
    if out.exists() and not (out / MARKER).exists() and (not out.is_dir() or any(out.iterdir())):
        raise DemoFailed(f"{out} was not made by a demo and is not empty; choose another folder with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / MARKER, "w")  # noqa: SIM115 - held as long as the run lasts
    except OSError as error:
        raise DemoFailed(f"{out} cannot be written ({error.strerror}); choose another folder with --out.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DemoFailed(f"Another demo is writing to {out}; wait for it or choose another --out.") from error
        shutil.rmtree(plan.work, ignore_errors=True)
        plan.work.mkdir(mode=0o700)
        yield


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(_number: int, _frame: Any) -> None:
    for number in STOPPING:  # what was started is being ended: a second Ctrl-C must not leave half of it running
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str]) -> int:
    """Run the demo; returns the exit code. Nothing that it started outlives it."""
    before = {number: signal.signal(number, _interrupt) for number in STOPPING}
    work: Path | None = None
    try:
        plan = parse(arguments)
        work = plan.work
        stages = Stages(STAGES + plan.kiosk)
        with own_folder(plan), nothing_left_behind():
            figures = flow.run(plan, stages)
            say("")
            for line in flow.summary(figures):
                say(line)
            say(f"Report: {plan.out / 'index.html'}   (figures: report.json; {clock(stages.total_seconds())} in all)")
            if plan.kiosk:
                flow.serve(plan, stages)
        return 0
    except KeyboardInterrupt:
        say("Stopped.")
        return 130
    except flow.ERRORS as error:
        say(f"scripts/demo: {error}")
        if work is not None and work.exists():
            say(f"Logs: {work}")
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
