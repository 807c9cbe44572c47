"""Following a run from the coordinator's window: submit it, then its events as they come, as lines or as JSON.

The run is the server's: whoever follows it may leave. Not here: what the run does (`server.rounds`).
"""

import datetime
import json
import time
from pathlib import Path
from typing import Any

import click

from server import events, runs
from server.alone import alone
from server.link import Link, LinkError

LONG = 7200  # seconds of waiting from which the hour of its end is said instead


def follow(link: Link, root: Path, config: dict[str, Any], as_json: bool) -> None:
    """Submit, then print events as they come until the run has ended. Raises LinkError when it failed."""
    if root.is_dir():
        with alone(root, say=lambda text: click.echo(text, err=True)):
            pass  # whoever was at work here has ended
    path = root / events.FILE
    place = path.stat().st_size if path.exists() else 0
    run_id = runs.submit(link, config)
    try:
        _show(link, root, run_id, place, as_json)
    except KeyboardInterrupt:
        click.echo(
            "The run goes on without this window: afya-server status tells how far it is, and stopping "
            "afya-server start stops it after a whole round.",
            err=True,
        )
        raise SystemExit(130) from None


def _show(link: Link, root: Path, run_id: int, place: int, as_json: bool) -> None:
    """Print the events of this run from byte `place` on. Raises LinkError when it failed."""
    asked, ended = time.monotonic(), ""
    while True:
        new, place = events.read(root, place)
        for event in new:
            if event.get("run", run_id) != run_id:
                continue  # of another one that has begun meanwhile, or has not ended yet
            if event["event"] in ("failed", "refused"):
                raise LinkError(f"The run has failed: {event['reason']}")
            click.echo(json.dumps(event) if as_json else sentence(event))
            if event["event"] == "finished":
                return
        if ended and not new:
            log = link.state / "superlink.log"
            raise LinkError(f"The run ended before its rounds were done ({ended}); the end of {log} says why.")
        if not new and time.monotonic() - asked > 10:
            status = runs.run_status(link, run_id)  # takes seconds: events written meanwhile are read once more
            asked, ended = time.monotonic(), status if status.startswith("finished") else ""
        time.sleep(0.3)


def sentence(event: dict[str, Any]) -> str:
    """One event of a run as a line for a person."""
    kind = event.get("event")
    if kind == "round":
        whom = ", ".join(event["clinics"])
        told = f"training factor {event['factor']} at {whom}" if whom else "too few clinics are there, nobody is asked"
        return f"Round {event['round']}: {told}"
    if kind == "waiting":
        return waiting(event)
    if kind == "accepted":
        loss = f"loss {event.get('loss-before', 0):.3f} -> {event.get('loss-after', 0):.3f}"
        whom = f"{event['examples']} samples of {event.get('cases', 0)} patients"
        return f"  {event['clinic']}: {whom}, {loss}, {event.get('seconds', 0):.0f} s"
    if kind in ("rejected", "set-aside", "not-installed", "not-examined"):
        return f"  {event['clinic']}: {kind}, {event.get('reason') or event.get('detail')}"
    if kind == "round-done":
        size = (event["bytes_down"] + event["bytes_up"]) / 1e6
        return f"  {event['reason']}; {event['seconds']:.0f} s, {size:.1f} MB"
    if kind == "installed":
        return f"  {event['clinic']}: installed {event['detail']}"
    rest = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("at", "event", "run"))
    return f"{str(kind).capitalize()}: {rest}"


def waiting(event: dict[str, Any]) -> str:
    """Whom a round waits for before it asks anybody."""
    here = ", ".join(event["clinics"]) or "nobody"
    if event["seconds"] >= LONG and "at" in event:  # an age that is true as long as the sentence stands there
        end = datetime.datetime.fromisoformat(event["at"]) + datetime.timedelta(seconds=event["seconds"])
        left = f"until {end.astimezone():%a %d %b %H:%M}"
    else:
        left = f"for at most {event['seconds']} s more"
    return f"Waiting for clinics: {event['needed']} are needed, {here} is there; {left}."
