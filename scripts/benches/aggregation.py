"""`scripts/bench aggregation`: bytes of a round and what putting the updates together takes, at a model's true size.

The updates are random numbers of the adapter's shapes, laid on the disk as the server lays them there (`server.spool`);
the time is that of `server.strategy.aggregate`, distances and drift included. Each case runs in a process of its own.
Bytes are those of the arrays in a message, without Flower's envelope.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

_PATH = click.Path(path_type=Path)
_MIB = 2**20


@click.command()
@click.option("--out", type=_PATH, required=True, help="JSON file for the results.")
@click.option("--preset", default="tinyllava-1.5b", show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--clinics", default="10,100", show_default=True, help="Numbers of clinics, by commas.")
@click.option("--modes", default="alternating,ffa,product-svd,factor-average", show_default=True)
@click.option("--one", nargs=2, hidden=True, help="Mode and clinics of one case in this process.")
@click.option("--work", type=_PATH, help="Folder for the updates (6 GB for 100 clinics) [default: a temporary one].")
def main(out: Path, preset: str, rank: int, clinics: str, modes: str, work: Path | None, **other: Any) -> None:
    """Measure aggregation of adapters on all linear layers of a decoder."""
    if other["one"]:
        mode, number = other["one"]
        assert work is not None
        out.write_text(json.dumps(case(work, preset, rank, mode, int(number))) + "\n", encoding="utf-8")
        return
    report: dict[str, Any] = {"preset": preset, "rank": rank, "cases": []}
    for mode in modes.split(","):
        for number in clinics.split(","):
            report["cases"].append(_apart(preset, rank, mode, number, work))
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(table(report))


def _apart(preset: str, rank: int, mode: str, number: str, work: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        found = Path(folder) / "case.json"
        command = [sys.executable, "-m", "scripts.benches.aggregation", "--one", mode, number, "--work", folder]
        command += ["--preset", preset, "--rank", str(rank), "--out", str(found)]
        click.echo(f"{mode}, {number} clinics", err=True)
        one = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # more threads are slower by far on a machine that is busy
        ran = subprocess.run(command, check=False, capture_output=True, text=True, env=one)
        if ran.returncode:
            raise click.ClickException(f"{mode} with {number} clinics failed: {ran.stderr[-800:]}")
        return dict(json.loads(found.read_text(encoding="utf-8")))


def case(work: Path, preset: str, rank: int, mode: str, number: int) -> dict[str, Any]:
    """Bytes, seconds and highest memory of one round with `number` clinics."""
    from model import adapters, memory, wire
    from scripts.benches.random_model import llava_config
    from server.aggregate import factors_of_round
    from server.spool import Spool
    from server.strategy import Update, aggregate

    llava_config(preset, 32000).save_pretrained(work / "base")
    before = wire.rounded(adapters.initial(work / "base", rank, 2.0 * rank, "decoder", 0))
    factor = factors_of_round(mode, 0)
    spool, updates = Spool(work / "incoming"), []
    for node in range(number):
        draw = np.random.default_rng(node)
        arrays = {
            name: (before[name] + 0.01 * draw.standard_normal(before[name].shape, np.float32))
            for name in before
            if adapters.factor(name) in factor
        }
        arrays = wire.rounded(arrays)
        size = wire.packed_bytes(arrays, factor)
        updates.append(Update(node, f"clinic {node}", spool.put(node, arrays), 100, 100, 1.0, size, {}))
    memory.reset_highest()
    began = time.perf_counter()
    outcome = aggregate(updates, before, mode=mode, scale=2.0)
    seconds = time.perf_counter() - began
    facts = {"mode": mode, "clinics": number, "seconds": seconds, "up": updates[0].bytes}
    facts |= {"down": wire.packed_bytes(before), "relative_error": outcome.quality["relative_error"]}
    return {**facts, "peak_rss": memory.highest_resident_bytes(), "arrays": len(before)}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"{report['preset']}, all linear layers of the decoder, rank {report['rank']}, 16 bits a value on the wire.",
        "",
    ]
    lines += ["| aggregation | clinics | MiB up a clinic | MiB down | seconds | peak RSS MiB | distance from mean |"]
    lines.append("|---" * 7 + "|")
    for row in report["cases"]:
        sizes = f"{row['up'] / _MIB:.1f} | {row['down'] / _MIB:.1f}"
        figures = f"{row['seconds']:.1f} | {row['peak_rss'] / _MIB:.0f} | {row['relative_error']:.1e}"
        lines.append(f"| {row['mode']} | {row['clinics']} | {sizes} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
