"""`scripts/bench simulation`: many clinics in Flower's simulation engine, with the same server and client apps.

Of all clinics a share is there in each round, and a share of those falls out while it trains. What is measured is the
coordination: seconds and bytes a round, and the memory of the server's process, against the number of clinics. The
model is a very small one, so that a thousand clinics fit on one computer. Needs `ray` (pip install afya[simulation]).
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_MIB = 2**20


@click.command()
@click.option("--out", type=_PATH, required=True, help="JSON file for the results.")
@click.option("--clinics", default="10,100,1000", show_default=True, help="Numbers of clinics, by commas.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--there", default=0.2, show_default=True, help="Share of the clinics that is there in a round.")
@click.option("--drop", default=0.1, show_default=True, help="Share of those that falls out while training.")
@click.option("--work", type=_PATH, help="Folder for homes and rounds [default: a temporary one].")
@click.option("--one", type=int, hidden=True, help="Run this many clinics in this process.")
def main(out: Path, clinics: str, rounds: int, there: float, drop: float, work: Path | None, one: int | None) -> None:
    """Measure rounds with many simulated clinics."""
    if importlib.util.find_spec("ray") is None:
        raise click.ClickException(
            "Flower's simulation engine needs ray; run .venv/bin/pip install -e '.[simulation]'."
        )
    try:
        numbers = [int(word) for word in clinics.split(",")]
    except ValueError as error:
        raise click.ClickException(f"--clinics {clinics} is no list of numbers; write 10,100,1000.") from error
    if one is not None:
        assert work is not None
        out.write_text(json.dumps(simulate(work, one, rounds, there, drop)) + "\n", encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        place = work or Path(folder)
        report: dict[str, Any] = {"there": there, "drop": drop, "clinics": {}}
        for number in numbers:
            report["clinics"][str(number)] = _apart(place / str(number), number, rounds, there, drop)
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(table(report))


def _apart(place: Path, number: int, rounds: int, there: float, drop: float) -> list[dict[str, Any]]:
    """One number of clinics in a process of its own, so that its memory is its own."""
    place.mkdir(parents=True, exist_ok=True)
    found, log = place / "rounds.json", place / "log.txt"
    command = [sys.executable, "-m", "scripts.benches.simulation", "--one", str(number), "--work", str(place)]
    command += ["--rounds", str(rounds), "--there", str(there), "--drop", str(drop), "--out", str(found)]
    click.echo(f"{number} clinics, {rounds} rounds", err=True)
    with log.open("wb") as stream:
        code = subprocess.run(command, check=False, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code or not found.is_file():
        raise click.ClickException(f"The simulation of {number} clinics failed; its log is {log}.")
    rows: list[dict[str, Any]] = json.loads(found.read_text(encoding="utf-8"))
    return rows


class SomeThere:
    """A Grid that shows another share of its nodes in each round; everything else is the real one's."""

    def __init__(self, grid: Any, share: float) -> None:
        """Wrap Flower's Grid."""
        self._grid, self._share, self._asked = grid, share, 0

    def get_nodes(self) -> Iterable[Any]:
        """A share of the nodes, drawn anew each time."""
        nodes = sorted(self._grid.get_nodes(), key=lambda node: int(node.node_id))
        self._asked += 1
        return random.Random(self._asked).sample(nodes, max(1, round(self._share * len(nodes))))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


def simulate(work: Path, number: int, rounds: int, there: float, drop: float) -> list[dict[str, Any]]:
    """Rounds with `number` clinics; a row each: seconds, bytes, accepted, rejected and the server's memory."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from scripts.benches.simulation_clinics import client_app

    base = small_model(work / "base")
    rows: list[dict[str, Any]] = []
    app = ServerApp()

    @app.main()
    def serve(grid: Grid, context: Context) -> None:
        rows.extend(_rounds(SomeThere(grid, there), work, base, rounds))

    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    settings: dict[str, Any] = {"client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}}
    settings["init_args"] = {"num_cpus": cores, "include_dashboard": False}
    run_simulation(app, client_app(work, base, drop), number, backend_config=settings)
    return rows


def _rounds(grid: Any, work: Path, base: Path, rounds: int) -> list[dict[str, Any]]:
    """Run the server's rounds one by one, looking at the process after each."""
    import psutil

    from server.rounds import federate
    from server.settings import Settings

    process, rows = psutil.Process(), []
    for last in range(1, rounds + 1):
        began = time.perf_counter()
        chosen = Settings(
            num_server_rounds=last, base_model=str(base), checkpoint_dir=str(work / "rounds"), rank=4, local_steps=4,
            batch_size=4, min_clinics=2, round_deadline=3600.0, release_every=10_000, gate="off",
        )  # fmt: skip
        now = federate(_NoRelease(grid), chosen)
        taken = {"seconds": time.perf_counter() - began, "rss_mib": process.memory_info().rss / _MIB}
        row = now.history[-1]
        taken |= {"round": now.round, "bytes_up": now.bytes_up, "bytes_down": now.bytes_down}
        rows.append({**taken, "accepted": len(row["accepted"]), "rejected": len(row["rejected"])})
        click.echo(json.dumps(rows[-1]))
    return rows


class _NoRelease:
    """The grid of a run that ends without bringing its adapter to anybody: only the rounds are measured."""

    def __init__(self, grid: Any) -> None:
        self._grid, self._trained = grid, False

    def get_nodes(self) -> Iterable[Any]:
        """The nodes of the one round; after it nobody is there."""
        first, self._trained = not self._trained, True
        return self._grid.get_nodes() if first else []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


def small_model(folder: Path) -> Path:
    """A very small model with random weights."""
    from model.build import ModelConfig, build
    from scripts.benches.simulation_clinics import ANSWERS, WORDS

    if not (folder / "config.json").is_file():
        small = ModelConfig(
            image_size=32, patch_size=16, tower_layers=2, tower_hidden=64, tower_heads=2, tower_mlp=128,
            decoder_layers=2, decoder_hidden=64, decoder_heads=2, decoder_mlp=128, vocabulary=300,
        )  # fmt: skip
        network, processor = build(small, [*WORDS, *ANSWERS], 0)
        network.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: medians over the rounds; memory after the first and after the last."""
    lines = ["| clinics | asked | accepted | seconds a round | KiB up a clinic | server RSS MiB: first, last round |"]
    lines.append("|---" * 6 + "|")
    for number, rows in report["clinics"].items():
        middle = sorted(rows, key=lambda row: row["seconds"])[len(rows) // 2]
        asked = middle["accepted"] + middle["rejected"]
        each = middle["bytes_up"] / max(1, middle["accepted"]) / 1024
        memory = f"{rows[0]['rss_mib']:.0f}, {rows[-1]['rss_mib']:.0f}"
        lines.append(f"| {number} | {asked} | {middle['accepted']} | {middle['seconds']:.1f} | {each:.0f} | {memory} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
