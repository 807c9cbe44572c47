"""`afya-server export-round`, `import-round` and `export-release`: rounds by stick, for clinics without a network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_CERTS = click.option("--certs", "folder", type=click.Path(path_type=Path), default=Path("certs"), show_default=True)
_STATE = click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=Path("federation"),
    show_default=True,
    help="Folder of this server.",
)
_OUT = click.option("--out", type=click.Path(path_type=Path), help="Folder of the rounds.  [default: STATE/rounds]")


def _guard(call: Callable[[], Any]) -> Any:
    """Run `call`; what is wrong with a file becomes one plain sentence and exit code 1, like every known failure."""
    from model.bundle import BundleRejected
    from server import cli

    try:
        return cli.guard(call)
    except BundleRejected as error:
        raise click.ClickException(str(error)) from error


@click.command("export-round")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_CERTS
@_STATE
@_OUT
@click.option("--set", "values", multiple=True, metavar="NAME=VALUE", help="A setting, as of afya-server rounds.")
def export_round(file: Path, folder: Path, state: Path, out: Path | None, values: tuple[str, ...]) -> None:
    """Write the next round to FILE, signed, for clinics to take by stick; the same file for all of them."""
    from server import cli, settings, usb
    from server.alone import alone
    from server.link import Link

    root, given = (out or state / "rounds").resolve(), cli.chosen(values)
    config = {**_guard(lambda: cli.so_far(root, given)), **given, "checkpoint-dir": str(root)}
    chosen = _guard(lambda: settings.read(config))

    def write() -> tuple[int, bool]:
        with alone(root, wait=0):
            return usb.issue(Link(folder.resolve(), state.resolve()), chosen, file)

    number, again = _guard(write)
    if again:
        click.echo(f"Round {number} was written before with other settings: give every clinic this file instead.")
    click.echo(f"Round {number} is in {file}; the clinics' replies go to `afya-server import-round FILE...`.")


@click.command("import-round")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@_CERTS
@_STATE
@_OUT
def import_round(files: tuple[Path, ...], folder: Path, state: Path, out: Path | None) -> None:
    """Conclude the round that was written last with the clinics' reply FILES, all at once."""
    from server import usb
    from server.alone import alone
    from server.link import Link

    root = (out or state / "rounds").resolve()

    def conclude() -> Any:
        with alone(root, wait=0):
            return usb.take(Link(folder.resolve(), state.resolve()), root, files)

    done = _guard(conclude)
    for rejection in done.rejected:
        click.echo(f"  {rejection.clinic}: {rejection.reason}")
    click.echo(f"Round {done.round}: {done.reason}.")


@click.command("export-release")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_CERTS
@_STATE
@_OUT
def export_release(file: Path, folder: Path, state: Path, out: Path | None) -> None:
    """Write the newest release to FILE, with its passport; the last round is examined first if it was not."""
    from server import usb_release
    from server.alone import alone
    from server.link import Link

    root = (out or state / "rounds").resolve()

    def send() -> Path:
        with alone(root, wait=0):
            return usb_release.send(Link(folder.resolve(), state.resolve()), root, file)

    found = _guard(send)
    click.echo(f"The release of {found.name} is in {file}; clinics run `afya-client import-release FILE`.")
