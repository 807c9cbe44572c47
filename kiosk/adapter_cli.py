"""`afya-kiosk adapter`: which adapters this clinic has, who vouches for them, and the way back to an earlier one.

Going back moves the pointer that a running kiosk watches: it answers with the other adapter from the next question on,
after its own checks (`kiosk.adapter_watch`). Not here: receiving adapters, which is the client's part.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click


@click.group()
def adapter() -> None:
    """List the adapters of this clinic, or go back to an earlier one."""


def _guard(call: Callable[[], Any]) -> Any:
    from model.adapters import AdapterRejected

    try:
        return call()
    except AdapterRejected as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'A file'}: {error.strerror or error}.") from error


@adapter.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_adapters(as_json: bool) -> None:
    """Say which adapters are here, which one is in use, and whether their passports are valid."""
    from model import installed
    from model.files import home

    rows = _guard(lambda: installed.listing(home()))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows]))
        return
    if not any(row.current for row in rows):
        click.echo("In use: the model as it was installed, without an adapter.")
    for row in rows:
        mark = "*" if row.current else " "
        words = row.problem or f"signed by the coordinator, {row.verdict}"
        click.echo(f"{mark} {row.name}  round {row.round}: {words}")


@adapter.command()
@click.option("--to", metavar="NAME", help="The adapter to use, as `list` names it.  [default: the one before]")
@click.option("--yes", is_flag=True, help="Do it without asking.")
def rollback(to: str | None, yes: bool) -> None:
    """Answer with the adapter before the current one again, or with the model as it was installed."""
    from model import installed
    from model.files import home

    to = to or installed.before(home())
    if not yes:
        click.confirm(f"Go back to {to or 'the model as it was installed'}?", abort=True)
    start = time.monotonic()
    name = _guard(lambda: installed.rollback(home(), to))
    seconds = time.monotonic() - start
    click.echo(f"In use from the next question on: {name or 'the model as it was installed'} ({seconds:.2f} s).")
