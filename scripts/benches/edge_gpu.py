"""`scripts/bench edge --gpu`: answers on one GPU, beside transformers' `generate` with bitsandbytes, alternately.

Random weights at true size. Speeds are medians over the pairs; a model that both engines use is loaded once by each in
one process, memory is measured in processes of their own. ONNX Runtime's CUDA provider is not part of it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

_SMALL, _LARGE = "tinyllava-1.5b", "llava-med-v1.5-7b"
# What is measured: name, case, preset, options. The most wanted come first: the report is written after each.
CASES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("1.5B, 4 bits", "pairs", _SMALL, ("--bits", "4")),
    ("1.5B, 8 bits", "pairs", _SMALL, ("--bits", "8")),
    ("1.5B, 4 bits", "memory", _SMALL, ("--bits", "4")),
    ("1.5B, 8 bits, eight people", "doctors", _SMALL, ("--bits", "8")),
    ("1.5B, 4 bits, eight people", "doctors", _SMALL, ("--bits", "4")),
    ("7B, 4 bits", "pairs", _LARGE, ("--bits", "4")),
    ("7B, float16, transformers", "memory", _LARGE, ("--bits", "16", "--engine", "transformers")),
    ("1.5B, 4 bits", "swap", _SMALL, ("--bits", "4")),
    ("7B, 4 bits", "memory", _LARGE, ("--bits", "4")),
    ("1.5B, 4 bits, transformers", "memory", _SMALL, ("--bits", "4", "--engine", "transformers")),
)


def measure(place: Path, out: Path, pairs: int, new: int, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the cases (those of the kinds `only`, if given) on models made in `place`; a case that fails is named."""
    import torch

    if not torch.cuda.is_available():
        raise click.ClickException("No GPU was found here; leave out --gpu for this computer's processor.")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "new": new}
    for name, case, preset, options in CASES:
        if only and case not in only:
            continue
        folder = place / preset
        _made(preset, folder)
        more = {"pairs": ("--pairs", str(pairs)), "doctors": ("--rounds", str(pairs))}.get(case, ())
        found = _run([case, str(folder), *options, *more, "--new", str(new)])
        report.setdefault(case, {})[name] = found
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        click.echo(f"{case}, {name}: {_short(found)}", err=True)
    return report


def _made(preset: str, folder: Path) -> None:
    """Random weights of the preset, made in a process of its own so that they leave the GPU."""
    if not (folder / "afya.json").is_file():
        command = [sys.executable, "-m", "scripts.benches.random_model", preset, "--out", str(folder)]
        if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
            raise click.ClickException(f"Random weights of {preset} could not be written to {folder}.")


def _run(options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "scripts.benches.edge_gpu_case", *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if ran.returncode or not lines:
        return {"failed": (ran.stderr or ran.stdout)[-800:]}
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def _short(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items() if key != "runs")


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"One {report['device']}, torch {report['torch']}, {report['new']} new tokens."]
    lines += ["", "| model | tokens/s, transformers | ours | | first token s, transformers | ours |", "|---" * 6 + "|"]
    for name, row in _measured(report, "pairs"):
        theirs, ours = row["transformers"], row["ours"]
        speed = f"{theirs['tokens_per_second']:.1f} | {ours['tokens_per_second']:.1f}"
        factor = ours["tokens_per_second"] / theirs["tokens_per_second"]
        first = f"{theirs['first_token_seconds']:.3f} | {ours['first_token_seconds']:.3f}"
        lines.append(f"| {name} | {speed} | {factor:.1f}x | {first} |")
    lines += ["", "| model | static GiB | peak GiB | open s | first answer s |", "|---" * 5 + "|"]
    for name, row in _measured(report, "memory"):
        peak = max(row["peak_gib"], row["warm_peak_gib"])
        times = f"{row['open_seconds']:.1f} | {row['first_answer_seconds']:.1f}"
        lines.append(f"| {name} | {row['static_gib']:.2f} | {peak:.2f} | {times} |")
    lines += ["", "| people | tokens/s of one | of all | | first token p95 s, one | all |", "|---" * 6 + "|"]
    for name, row in _measured(report, "doctors"):
        one, many = row["one"], row["many"]
        speed = f"{one['tokens_per_second']:.0f} | {many['tokens_per_second']:.0f}"
        factor = many["tokens_per_second"] / one["tokens_per_second"]
        lines.append(f"| {name} | {speed} | {factor:.1f}x | {one['p95']:.3f} | {many['p95']:.3f} |")
    for name, row in _measured(report, "swap"):
        speeds = (
            f"{row['bare']['tokens_per_second']:.0f} tokens/s bare, {row['adapted']['tokens_per_second']:.0f} adapted"
        )
        lines += [
            "",
            f"Adapter swap, {name}: {row['swap_seconds']:.2f} s (longest {row['longest_swap_seconds']:.2f}); {speeds}.",
        ]
    failed = [f"{case}, {name}" for case in ("pairs", "memory", "doctors", "swap") for name in _failed(report, case)]
    return "\n".join([*lines, *(f"Not measured: {name}." for name in failed)])


def _measured(report: dict[str, Any], case: str) -> list[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, row in report.get(case, {}).items() if "failed" not in row]


def _failed(report: dict[str, Any], case: str) -> list[str]:
    return [name for name, row in report.get(case, {}).items() if "failed" in row]
