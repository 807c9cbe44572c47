"""`afya-model plan`: which known model, bits and length of conversation fit a machine, and why."""

from __future__ import annotations

import dataclasses
import json

import click


@click.command()
@click.option("--ram", type=float, required=True, metavar="GIB", help="Memory of the computer.")
@click.option("--gpu", type=float, default=0.0, metavar="GIB", help="Memory of its GPU [default: no GPU].")
@click.option("--kiosk/--no-kiosk", default=True, show_default=True, help="Count the kiosk's screens with it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def plan(ram: float, gpu: float, kiosk: bool, as_json: bool) -> None:
    """Say which known models fit a machine, at how many bits, for how long a conversation. Says nothing of speed."""
    from model import plan as planning

    try:
        found = planning.plan(ram, gpu, kiosk)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    first = planning.best(found)
    if as_json:
        allowances = {"system_bytes": planning.SYSTEM_BYTES, "cuda_bytes": planning.CUDA_BYTES}
        measured = {"process_bytes": planning.PROCESS_BYTES, "kiosk_bytes": planning.KIOSK_BYTES}
        rows = {"best": [dataclasses.asdict(one) for one in first], "all": [dataclasses.asdict(one) for one in found]}
        click.echo(json.dumps({**rows, "measured": measured, "allowances": allowances}))
        return
    for one in found:
        mark = "*" if one in first else " "
        click.echo(
            f"{mark} {one.model:<18}{one.device}{one.bits:>4} bits  {'fits' if one.fits else 'no  '}  {one.why}."
        )
    click.echo("\n* to begin with: the GPU where one is large enough, then the most bits that fit.")
    if gpu:
        click.echo(
            "The computer's own memory must hold the kiosk beside a model on the GPU: "
            f"about {(planning.PROCESS_BYTES + planning.KIOSK_BYTES) / planning.GIB:.1f} GiB."
        )
