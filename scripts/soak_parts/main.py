"""`scripts/soak`: runs the cases one after another, writes the report after each, ends with the table.

Everything it starts is marked and ended on leaving, Ctrl-C included. A case that was not survived is tried again by the
next call with the same report; what had happened stays in it under "failures".
"""

import datetime
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from scripts.demo_parts.pool import nothing_left_behind
from scripts.federation import FederationFailed
from scripts.soak_parts import kills
from scripts.soak_parts.deployment import NotSurvived
from scripts.soak_parts.report import Outcome, Report, table
from scripts.soak_parts.schedule import FAULTS, KILLS, LINES, Case, plan
from scripts.soak_parts.town import Town
from server.link import LinkError

_PATH = click.Path(path_type=Path)


def lies() -> tuple[str, ...]:
    """What a lying clinic sends, by name."""
    from scripts.soak_parts.lies import LIES

    return tuple(LIES)


def tricks() -> tuple[str, ...]:
    """What an impostor tries, by name."""
    from scripts.soak_parts.impostors import TRICKS

    return tuple(TRICKS)


def faults() -> dict[str, Callable[[Town, Case], Outcome]]:
    """What does each fault."""
    from scripts.soak_parts import impostors, lines, poison

    others = {"line": lines.trouble, "poison": poison.lie, "impostor": impostors.attempt}
    return {**dict.fromkeys(KILLS, kills.kill), **others}


def rows() -> dict[str, str]:
    """The faults of the table in words, in its order."""
    return {**KILLS, **LINES, "poison": "a clinic sends poison", "impostor": "an impostor"}


def run(cases: list[Case], report: Report, work: Path, minutes: float, say: Callable[[str], None]) -> None:
    """Do every case that the report does not hold yet, until the minutes are over."""
    began, does = time.monotonic(), faults()
    with Town(work) as town:
        for number, case in enumerate(cases, 1):
            if report.has(case.key):
                continue
            if minutes and time.monotonic() - began > 60 * minutes:
                say(f"The {minutes:g} minutes are over before case {number} of {len(cases)}.")
                return
            start = time.monotonic()
            try:
                outcome = does[case.fault](town, case)
            except (NotSurvived, FederationFailed, LinkError, OSError) as error:
                outcome = Outcome(False, " ".join(str(error).split())[-600:])
                town.abandon()
            report.note(**{f"usual seconds, {mode}": usual for mode, usual in town.usual.items()})
            report.add(case.key, case.kind if case.fault == "line" else case.fault, outcome)
            word = "survived" if outcome.survived else "NOT SURVIVED"
            say(f"[{number}/{len(cases)}] {case.key}: {word} in {time.monotonic() - start:.0f} s; {outcome.words}")


@click.command()
@click.option("--out", type=_PATH, required=True, help="JSON file of the report; an earlier one is gone on with.")
@click.option("--points", default=20, show_default=True, type=click.IntRange(1, 1000))
@click.option("--only", multiple=True, type=click.Choice(FAULTS), help="One kind of fault; repeat it.")
@click.option("--minutes", default=0.0, help="Start no new case after so many minutes.  [default: no end]")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--work", type=_PATH, help="Folder for everything else [default: a temporary one].")
@click.option("--table", "only_table", is_flag=True, help="Print the table of the report and end.")
def main(
    out: Path, points: int, only: tuple[str, ...], minutes: float, seed: int, work: Path | None, only_table: bool
) -> None:
    """Do to a real federation on loopback what happens to real ones, and say what was survived."""
    try:
        report = Report(out)
    except ValueError as error:
        raise click.ClickException(f"{out}: {error}") from error
    if not only_table:
        before = {
            number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            report.note(begun=now, points=points, seed=seed, python=platform.python_version())
            with nothing_left_behind(), tempfile.TemporaryDirectory() as folder:
                run(plan(points, seed, only, lies(), tricks()), report, work or Path(folder), minutes, _say)
        except KeyboardInterrupt:
            click.echo(f"Stopped; {out} holds what was done.", err=True)
            sys.exit(130)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    click.echo(table(report, rows()))
    failures = report.failures()
    for sentence in failures:
        click.echo(f"Not survived: {sentence}", err=True)
    sys.exit(bool(failures))


def _say(text: str) -> None:
    click.echo(text, err=True)


def _interrupt(_number: int, _frame: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a second Ctrl-C must not leave half of it running
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
