"""`afya-model memory`: static and dynamic memory, first token and speed at several precisions: table, plot, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from model.measure import ANSWERS, GIB, RESULT, Plan

REPORT, PICTURE, LOG = "memory.json", "memory.png", "log.txt"
_FILE = click.Path(path_type=Path)
MIB = 2**20


class MeasurementError(RuntimeError):
    """Nothing could be measured; the message says why and where the log is."""


def options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of `afya-model memory`."""
    for option in reversed(
        (
            click.option("--model", type=_FILE, help="Model folder [default: the reference model]."),
            click.option("--bits", default="16,8,4", show_default=True, help="Precisions, separated by commas."),
            click.option("--backend", default="torch", show_default=True, help="torch, onnx, or both, by commas."),
            click.option("--data", "dataset", type=_FILE, help="Questions to ask [default: synthetic radiographs]."),
            click.option("--images", type=_FILE, help="Folder of the images [default: found beside the data]."),
            click.option("--adapter", type=_FILE, help="LoRA adapter folder to put beside the model."),
            click.option("--device", help="cpu, cuda or cuda:N [default: cuda where there is one]."),
            click.option("--limit", type=click.IntRange(2), default=20, show_default=True, help="How many questions."),
            click.option("--max-new-tokens", type=click.IntRange(1, 1024), default=64, show_default=True),
            click.option("--out", type=_FILE, required=True, help="Folder for the report, the plot and the answers."),
            click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
        )
    ):
        command = option(command)
    return command


def plans(bits: str, backend: str, out: Path, **given: Any) -> list[Plan]:
    """One plan for each backend and precision, in the order given. Raises `click.BadParameter`."""
    from model.llava import BITS
    from model.select import NAMES

    wanted = [part.strip() for part in bits.split(",") if part.strip()]
    if not wanted or any(not part.isdigit() or int(part) not in BITS for part in wanted):
        raise click.BadParameter(f"{bits!r} is no list of {', '.join(map(str, BITS))}.", param_hint="--bits")
    names = [part.strip() for part in backend.split(",") if part.strip()]
    if not names or any(name not in NAMES for name in names):
        raise click.BadParameter(f"{backend!r} is no list of {', '.join(NAMES)}.", param_hint="--backend")
    return [
        Plan(backend=name, bits=int(part), out=str(out / f"{name}-{part}"), **given)
        for name in names
        for part in wanted
        if (name, part) != ("onnx", "16")  # not offered there; 32 is
    ]


def run_all(todo: Sequence[Plan], out: Path, progress: bool) -> dict[str, Any]:
    """Measure each plan in a fresh process, one after the other; writes memory.json and memory.png into `out`."""
    from tqdm import tqdm

    from model import files

    results = []
    with tqdm(total=sum(plan.limit for plan in todo), desc="measure", unit="answer", disable=not progress) as bar:
        for plan in todo:
            results.append(_apart(_quantized(plan, out), bar))
    report = {"results": results, "measured_one_by_one": True}
    files.write_atomic(out / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    draw(results, out / PICTURE)
    return report


def _quantized(plan: Plan, out: Path) -> Plan:
    """The plan with a folder that ONNX Runtime reads; it is written into `out` where the model is not quantized yet."""
    from model import manifest, quantize

    folder = Path(plan.model)
    if plan.backend != "onnx" or manifest.is_quantized(folder):
        return plan
    target = out / f"quantized-{plan.bits}"
    quantize.quantize(folder, target, quantize.plan(plan.bits))
    return replace(plan, model=str(target))


def _apart(plan: Plan, bar: Any) -> dict[str, Any]:
    folder = Path(plan.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    (folder / "plan.json").write_text(json.dumps(asdict(plan)), encoding="utf-8")
    command = [sys.executable, "-m", "model.measure", str(folder / "plan.json")]
    with (
        open(folder / LOG, "w", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as child,
    ):
        try:
            for _ in child.stdout or ():
                bar.update(1)
        except BaseException:
            child.kill()  # Ctrl-C here must not leave it measuring
            raise
    if child.returncode or not (folder / RESULT).exists():
        last = [line for line in (folder / LOG).read_text(encoding="utf-8").splitlines() if line.strip()]
        why = last[-1].split(": ", 1)[-1] if last else f"it ended with code {child.returncode}"
        raise MeasurementError(f"{plan.backend} at {plan.bits} bits could not be measured: {why} (log: {folder / LOG})")
    return dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Lines of text; percentages against the first row."""
    titles = (("", -10), ("static MiB", 18), ("peak MiB", 18), ("first token s", 15), ("(cold)", 9), ("tokens/s", 10))
    head = "".join(title.ljust(-width) if width < 0 else title.rjust(width) for title, width in titles)
    lines, base = [head + "J/question".rjust(12)], results[0]
    for row in results:
        name = f"{row['backend']} {row['bits']}"
        cells = [f"{name:<10}"]
        for key in ("static_bytes", "peak_bytes"):
            change = "" if row is base else f" ({100 * (row[key] / base[key] - 1):+.0f} %)"
            cells.append(f"{row[key] / MIB:.1f}{change}".rjust(18))
        cells += [f"{row['first_token_warm']:.3f}".rjust(15), f"{row['first_token_cold']:.2f}".rjust(9)]
        cells.append(("-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.1f}").rjust(10))
        cells.append(("-" if row["joules_per_question"] is None else f"{row['joules_per_question']:.2f}").rjust(12))
        lines.append("".join(cells))
    lines += [f"{row['backend']} {row['bits']}: {row['reason']}" for row in results]
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Static and peak memory of each row as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(1.6 + 1.5 * len(results), 3.6), dpi=110)
    names = [f"{row['backend']}\n{row['bits']} bits" for row in results]
    places = range(len(results))
    for offset, key, label in ((-0.2, "static_bytes", "weights (static)"), (0.2, "peak_bytes", "peak while answering")):
        bars = axis.bar([place + offset for place in places], [row[key] / GIB for row in results], 0.38, label=label)
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set_xticks(list(places), names)
    axis.set_ylabel("GiB")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


__all__ = ["ANSWERS", "REPORT", "MeasurementError", "options", "plans", "run_all", "table"]
