"""`scripts/bench train`: training at true size, the original recipe and ours alternately in one run, one GPU.

Each case runs in a process of its own, so that memory is its own. Speeds are medians over the steps after the fifth;
the losses of both recipes on the same batches are compared step by step.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_CHOICES = ("projector", "llm+projector", "all", "lora")
_SETTINGS = {"everything trained": "all", "tower frozen, as the original really ran": "llm+projector"}


@click.command()
@click.option("--gpu", is_flag=True, help="Confirm that this runs on a GPU of 80 GiB or more.")
@click.option("--out", type=_PATH, required=True, help="JSON file for the results.")
@click.option("--data", type=_PATH, help="SLAKE, VQA-RAD or LLaVA rows to train on [default: random tokens].")
@click.option("--images", type=_PATH, help="Folder of the pictures.")
@click.option("--tokenizer", type=_PATH, help="tokenizer.json of the decoder [default: made-up words].")
@click.option("--preset", default="tinyllava-1.5b", show_default=True, help="Model whose true size is taken.")
@click.option("--pairs", default=2, show_default=True, help="Times that each pair of recipes is run.")
@click.option("--steps", default=20, show_default=True)
@click.option("--batch", default=32, show_default=True)
def main(
    gpu: bool,
    out: Path,
    data: Path | None,
    images: Path | None,
    tokenizer: Path | None,
    preset: str,
    pairs: int,
    steps: int,
    batch: int,
) -> None:
    """Measure training speed and memory against the original recipe, side by side."""
    import torch

    if not gpu or not torch.cuda.is_available():
        raise click.ClickException("Training at true size needs a GPU; run this on one, with --gpu.")
    from scripts.benches import random_model, train_batches

    with tempfile.TemporaryDirectory() as folder:
        model = random_model.write(preset, tokenizer, Path(folder) / "model")
        batches = Path(folder) / "batches.safetensors"
        train_batches.make(model, data, images, steps, batch, batches)
        torch.cuda.empty_cache()
        common = ["--model", str(model), "--batches", str(batches)]
        report: dict[str, Any] = {"preset": preset, "batch": batch, "steps": steps, "settings": {}, "least_memory": {}}
        report |= {"rows": data.name if data else "random tokens", "torch": torch.__version__}
        report |= {"device": torch.cuda.get_device_name()}
        for name, kind in _SETTINGS.items():
            report["settings"][name] = _pairs(common, kind, pairs, steps)
            _save(out, report)
        for kind in _CHOICES:
            report["least_memory"][kind] = _case([*common, *_least(kind)])
            _save(out, report)
    click.echo(table(report))


def _save(out: Path, report: dict[str, Any]) -> None:
    """Write what is known so far: a run that is cut off loses only the case it was at."""
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _least(kind: str) -> list[str]:
    return ["--case", "ours", "--trainable", kind, "--steps", "3", "--batch", "1", "--least-memory"]


def _pairs(common: list[str], kind: str, pairs: int, steps: int) -> dict[str, Any]:
    """Both recipes in turn, `pairs` times, and what they come to together."""
    runs: dict[str, list[dict[str, Any]]] = {"original": [], "ours": []}
    for _ in range(pairs):
        for case, done in runs.items():
            done.append(_case([*common, "--case", case, "--trainable", kind, "--steps", str(steps)]))
    both = [runs[case][0]["losses"] for case in runs]
    apart = max(abs(a - b) / a for a, b in zip(*both, strict=True))
    rates = {case: statistics.median(run["samples_per_second"] for run in done) for case, done in runs.items()}
    return {
        "runs": runs,
        "samples_per_second": rates,
        "times_faster": rates["ours"] / rates["original"],
        "largest_relative_loss_difference": apart,
    }


def _case(options: list[str]) -> dict[str, Any]:
    """One case in a fresh process. A case that fails is reported as failed, with its last words."""
    command = [sys.executable, "-m", "scripts.benches.train_case", *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise click.ClickException(f"{' '.join(options)} failed: {(ran.stderr or ran.stdout)[-1500:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    click.echo(f"{options[4:]}: {found['samples_per_second']:.1f} samples/s, {found['peak_gib']:.1f} GiB", err=True)
    return found


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    head = "| what is trained | recipe | samples/s | peak GiB | times the original | loss apart |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, found in report["settings"].items():
        for case, rate in found["samples_per_second"].items():
            peak = max(run["peak_gib"] for run in found["runs"][case])
            apart = f"{found['times_faster']:.2f} | {found['largest_relative_loss_difference']:.1e}"
            more = apart if case == "ours" else "1 |"
            lines.append(f"| {name} | {case} | {rate:.1f} | {peak:.1f} | {more} |")
    lines += ["", "| trained | least GPU memory, batch 1, GiB |", "|---|---|"]
    lines += [f"| {kind} | {found['peak_gib']:.2f} |" for kind, found in report["least_memory"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
