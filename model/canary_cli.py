"""`afya-model canary`: may this model answer? Every check with its result; exit code 1 where one failed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

_FILE = click.Path(path_type=Path)


@click.command()
@click.option("--model", type=_FILE, help="Model folder [default: the reference model].")
@click.option(
    "--bits",
    type=click.Choice(["32", "16", "8", "4"]),
    help="Bits per weight [default: those of a quantized folder, else 4].",
)
@click.option("--adapter", type=_FILE, help="LoRA adapter folder to put beside the model.")
@click.option("--device", help="cpu, cuda or cuda:N [default: cuda where there is one].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def canary(model: Path | None, bits: str | None, adapter: Path | None, device: str | None, as_json: bool) -> None:
    """Load a model and see that it is the one in its folder, runs as asked, and looks at the picture."""
    from model import presets
    from model.adapters import AdapterRejected
    from model.backend_choice import open_backend
    from model.canary import CanaryReport, Check, check
    from model.llava import ModelError

    try:
        folder = model if model is not None else presets.reference_path()
        backend = open_backend(folder, int(bits) if bits else None, adapter, device)
        report, reason = check(backend, folder, device=device, adapter=adapter), backend.reason
    except (AdapterRejected, ModelError, presets.PresetMissing) as error:
        report, reason = CanaryReport((Check("loading", str(error)),), 0.0), ""
    if as_json:
        facts = {"passed": report.problem is None, "problem": report.problem, "reason": reason}
        click.echo(json.dumps({**facts, **dataclasses.asdict(report)}))
    else:
        for one in report.checks:
            click.echo(f"{'FAILED' if one.problem else 'ok':<7} {one.name}{f': {one.problem}' if one.problem else ''}")
        click.echo(reason if report.problem is None else "This model must not answer.")
    if report.problem:
        raise SystemExit(1)
