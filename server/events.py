"""What happens in a federated run, one JSON line each, beside the checkpoints: for `afya-server rounds` and people."""

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


class Events:
    """Appends to events.jsonl in `root`, flushed line by line, and prints the same for Flower's own log."""

    run: int | None = None  # Flower's number of the run that this process works for

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.path = root / FILE

    def add(self, event: str, /, **values: Any) -> None:
        """Append one event with its time (UTC); of `values` neither can replace the event's own name and time."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        own = {"at": now, "event": event, **({} if Events.run is None else {"run": Events.run})}
        line = json.dumps(own | values | own, allow_nan=False)
        with open(self.path, "a", encoding="utf-8") as out:
            out.write(line + "\n")
            out.flush()
            os.fsync(out.fileno())
        print(line, flush=True)


def read(root: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Events from byte `start` on and the byte to go on from; a line that is not finished yet is left for later."""
    try:
        with open(root / FILE, "rb") as source:
            source.seek(start)
            data = source.read()
    except FileNotFoundError:
        return [], start
    whole = data[: data.rfind(b"\n") + 1]
    return list(_parse(whole)), start + len(whole)


def _parse(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            yield {"event": "unreadable", "line": line.decode("utf-8", "replace")[:200]}
