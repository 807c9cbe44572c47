"""Rounds by stick on the command line of `afya-client` (import-round, export-round, import-release), and `budget`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def _guard(call: Callable[[], Any]) -> Any:
    """Run `call`; a refusal or a known kind of failure becomes one plain sentence and exit code 1."""
    from client.limits import Refused, SettingsWrong
    from model.adapters import AdapterRejected
    from model.bundle import BundleRejected
    from model.llava import ModelError
    from model.presets import PresetMissing

    try:
        return call()
    except (AdapterRejected, BundleRejected, ModelError, PresetMissing, SettingsWrong) as error:
        raise click.ClickException(str(error)) from error
    except Refused as error:
        raise click.ClickException(f"This clinic refuses: {error}.") from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'A file'}: {error.strerror or error}.") from error


@click.command("import-round")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def import_round(file: Path) -> None:
    """Train the round in the coordinator's FILE, within this clinic's limits; then export-round writes the answer."""
    from client import courtesy, limits, rounds_file
    from model import files

    home = files.home()
    courtesy.be_nice(limits.niceness(home))
    metrics = _guard(lambda: rounds_file.take(home, file))
    click.echo(f"Round {metrics['server-round']}: {metrics['steps']} steps on {metrics['num-examples']} samples.")
    click.echo("Run `afya-client export-round FILE` with a place on the stick.")


@click.command("export-round")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def export_round(file: Path) -> None:
    """Write this clinic's answer to the last round to FILE, signed, for the coordinator."""
    from client import rounds_file
    from model import files

    number = _guard(lambda: rounds_file.give(files.home(), file))
    click.echo(f"The answer to round {number} is in {file}.")


@click.command("import-release")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def import_release(file: Path) -> None:
    """Check the adapter in the coordinator's FILE and install it where this clinic's kiosk finds it."""
    from client import rounds_file
    from model import files

    click.echo(f"Adapter {_guard(lambda: rounds_file.install(files.home(), file))} installed.")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def budget(as_json: bool) -> None:
    """Say how much of this clinic's privacy budget is spent, and on which rounds."""
    from client import ledger, limits, service
    from model import files

    home = files.home()
    allowed = _guard(lambda: limits.read_limits(home))
    entries = _guard(lambda: ledger.read(home))
    spent = _guard(lambda: ledger.epsilon(entries, allowed.dp_delta))
    fault = service.behind(home)
    if as_json:
        found = {"dp": allowed.dp, "epsilon": spent, "budget": allowed.dp_epsilon, "delta": allowed.dp_delta}
        found |= {"fault": fault} if fault else {}
        click.echo(json.dumps({**found, "rounds": [entry.round for entry in entries]}))
        return
    click.echo(f"Differential privacy is {'on' if allowed.dp else 'off'}.")
    click.echo(f"Spent     {spent:.3f} of {allowed.dp_epsilon:g} (delta {allowed.dp_delta:g}), {len(entries)} rounds")
    for entry in entries:
        click.echo(f"Round     {entry.round}, {entry.at}: {entry.steps} steps, noise {entry.multiplier:g}")
    if fault:
        click.echo(f"FAULT     {fault}")
