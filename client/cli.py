"""afya-client: the commands of a hospital's IT person. Heavy imports happen inside them, so --help answers at once."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

_SERVER = click.option("--server", metavar="HOST:PORT", help="The federation's server.  [default: afya.toml]")
_BUNDLE = click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Folder from the coordinator: ca.crt, node.key.  [default: HOME/federation]",
)
_PORT = click.option(
    "--port", type=int, help="Local port of the SuperNode, one for each on a machine.  [default: 9094]"
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
@click.version_option(package_name="afya")
def main() -> None:
    """Take part in a federation with this clinic's consented samples; images never leave."""


def _guard(call: Callable[[], Any]) -> Any:
    """Run `call`; a known kind of failure becomes one plain sentence and exit code 1."""
    from client.limits import SettingsWrong
    from model.adapters import AdapterRejected
    from model.data import DataError
    from model.llava import ModelError
    from model.presets import PresetMissing

    try:
        return call()
    except (AdapterRejected, DataError, ModelError, PresetMissing, SettingsWrong) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@_SERVER
@_BUNDLE
@_JSON
def doctor(server: str | None, bundle: Path | None, as_json: bool) -> None:
    """Look at everything that taking part needs and name every fault at once."""
    from client import node
    from model import files

    home = files.home()
    checks = _guard(lambda: node.examine(home, node.connection(home, server, bundle)))
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks]))
    else:
        for check in checks:
            click.echo(f"{'ok   ' if check.ok else 'FAULT'} {check.name}: {check.detail}")
    if not all(check.ok for check in checks):
        raise click.exceptions.Exit(1)


@main.command()
@_SERVER
@_BUNDLE
@_PORT
def join(server: str | None, bundle: Path | None, port: int | None) -> None:
    """Check everything, then take part until interrupted; a lost connection is taken up again by itself."""
    from client import node
    from model import files

    home = files.home()
    link = _guard(lambda: node.connection(home, server, bundle, port))
    faults = [f"{c.name}: {c.detail}" for c in _guard(lambda: node.examine(home, link)) if not c.ok]
    if faults or link is None:
        raise click.ClickException(" ".join(faults))
    click.echo(f"Taking part at {link.server}; interrupt to leave.")
    node.join(home, link)


@main.command()
@_JSON
def status(as_json: bool) -> None:
    """Say how many samples are consented, which adapter is in use and what a federation may ask."""
    from client import limits
    from model import adapters, files, installed
    from model.data import read_training

    home = files.home()

    def gather() -> dict[str, Any]:
        adapters.current(home)  # raises when the files are not the ones that were installed
        record = installed.pointer(home)
        samples = len(read_training(home / "training"))
        return {"home": str(home), "samples": samples, "adapter": record, "limits": asdict(limits.read_limits(home))}

    found = _guard(gather)
    if as_json:
        click.echo(json.dumps(found))
        return
    adapter = found["adapter"]
    click.echo(f"Home      {found['home']}\nSamples   {found['samples']} consented")
    click.echo(f"Adapter   {adapter['name'] + ', installed ' + adapter['installed_at'] if adapter else 'none'}")
    for name, value in found["limits"].items():
        click.echo(f"Limit     {name} = {value}")


@main.command()
@click.option("--yes", is_flag=True, help="Do it without asking.")
def rollback(yes: bool) -> None:
    """Go back to the adapter before the current one, or to the bare base model."""
    from model import adapters, files

    if not yes:
        click.confirm("Go back to the adapter before?", abort=True)
    name = _guard(lambda: adapters.rollback(files.home()))
    click.echo(f"In use now: {name or 'the bare base model'}.")
