"""`afya-server rollback`: release an earlier adapter again, under a new number, to every connected clinic.

The rounds and their checkpoints stay as they are; a candidate of a later round is compared with what clinics then have
installed. Not here: what a clinic does by itself (`afya-kiosk adapter rollback`).
"""

import time
from pathlib import Path

import click


@click.command()
@click.option("--to", metavar="ROUND", type=click.IntRange(1), help="Round of the release.  [default: the one before]")
@click.option("--certs", "folder", type=click.Path(path_type=Path), default=Path("certs"), show_default=True)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=Path("federation"),
    show_default=True,
    help="Folder of this server.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the rounds.  [default: STATE/rounds]")
@click.option("--yes", is_flag=True, help="Do it without asking.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as a JSON line.")
def rollback(to: int | None, folder: Path, state: Path, out: Path | None, yes: bool, as_json: bool) -> None:
    """Bring an earlier release to the clinics again; the server must be started."""
    from server import cli, follow, runs, signing
    from server import link as links

    if not yes:
        click.confirm(f"Release {f'round {to}' if to else 'the adapter before'} again?", abort=True)
    start = time.monotonic()
    link = links.existing(folder, state)
    root = (out or state / "rounds").resolve()
    config = {"checkpoint-dir": str(root), "rollback": to or -1}
    cli.guard(lambda: runs.require_started(link))
    cli.guard(lambda: config.update({"signing-key": str(signing.signing_key(folder.resolve()))}))
    cli.guard(lambda: follow.follow(link, root, config, as_json))
    click.echo(f"Done in {time.monotonic() - start:.1f} s.", err=as_json)
