"""`afya-model quantize`: write a quantized copy of a model folder, and say what became of it.

Only click is imported here; the rest is imported when the command runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

_FILE = click.Path(path_type=Path)
_MIB = 2**20


@click.command("quantize")
@click.argument("model", type=_FILE)
@click.option("--backend", type=click.Choice(["onnx", "torch"]), default="onnx", show_default=True)
@click.option("--bits", type=click.Choice(["8", "4"]), default="4", show_default=True, help="Bits per decoder weight.")
@click.option("--block", type=click.Choice(["32", "64", "128", "256"]), show_default="256 at 4 bits, 128 at 8",
              help="Weights that share a scale (onnx): more are faster, fewer more accurate.")  # fmt: skip
@click.option("--out", required=True, type=_FILE, help="Folder to write; an unfinished one is continued.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def quantize(model: Path, backend: str, bits: str, block: str | None, out: Path, as_json: bool) -> None:
    """Quantize the MODEL folder and write weights, tokenizer and a manifest with sizes and hashes."""
    from model.llava import ModelError

    try:
        manifest = _run(model, backend, int(bits), int(block) if block else None, out, not as_json)
    except ModelError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{out} cannot be written ({error}); free the disk and run it again.") from error
    if as_json:
        click.echo(json.dumps({"folder": str(out), **manifest}))
        return
    for name, part in manifest["files"].items():
        click.echo(f"{part['bytes'] / _MIB:9.1f} MiB  {part['sha256'][:12]}  {name}")
    total = sum(part["bytes"] for part in manifest["files"].values())
    click.echo(f"{total / _MIB:9.1f} MiB  in {out}: {manifest['parameters']:,} parameters at {bits} bits")


def _run(model: Path, backend: str, bits: int, block: int | None, out: Path, shown: bool) -> dict[str, Any]:
    if backend == "torch":
        from model import quantized_torch

        return quantized_torch.write(model, out, bits)
    from tqdm import tqdm

    from model import quantize as work
    from model.onnx_source import Source

    total = Source(model).parameters() if Path(model).is_dir() else 0
    with tqdm(total=total, unit="w", unit_scale=True, desc="quantize", disable=not shown, mininterval=0.5) as bar:
        return work.quantize(model, out, work.plan(bits, block), bar.update)
