"""The report of a soak: a JSON file that is whole after every case, and its table.

Several soaks may write to one file at once, each with other faults (`--only`): a case is added under a lock to what the
file holds then. Not here: what a case is and whether it was survived.
"""

import fcntl
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model.files import write_atomic


@dataclass(frozen=True)
class Outcome:
    """What came of one case: `recovery` is seconds until every clinic's reply counted again, None where none is due.

    `repeated` counts rounds whose work was done twice; `notes` are numbers and words of this fault alone.
    """

    survived: bool
    words: str
    recovery: float | None = None
    repeated: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


class Report:
    """The cases that were done, by "FAULT: NAME"."""

    def __init__(self, path: Path) -> None:
        """Take up the report in `path` where there is one. Raises ValueError for a file that is no report."""
        self.path = path
        self.cases: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        found = json.loads(self.path.read_bytes())
        if not isinstance(found, dict) or not isinstance(found.get("cases"), dict):
            raise ValueError(f"{self.path} is no report of a soak; choose another --out.")
        self.cases, self.facts = found["cases"], found.get("facts", {})

    def has(self, key: str) -> bool:
        """Whether a case was done already, here or in an earlier run, and survived; one that was not is tried again."""
        return bool(self.cases.get(key, {}).get("survived"))

    def add(self, key: str, fault: str, outcome: Outcome) -> None:
        """Keep one outcome; the file is whole when this returns."""
        earlier = self.cases.get(key, {})
        failures = [*earlier.get("failures", []), *([earlier["words"]] if earlier and not earlier["survived"] else [])]
        row = {"fault": fault, **asdict(outcome), **({"failures": failures} if failures else {})}
        self._write({key: row}, {})

    def note(self, **facts: Any) -> None:
        """Keep facts about the whole soak, for example the usual seconds of a round."""
        self._write({}, facts)

    def _write(self, cases: dict[str, Any], facts: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f".{self.path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read()
            self.cases, self.facts = {**self.cases, **cases}, {**self.facts, **facts}
            text = json.dumps({"facts": self.facts, "cases": self.cases}, indent=1)
            write_atomic(self.path, (text + "\n").encode())

    def failures(self) -> list[str]:
        """A plain sentence for each case that was not survived."""
        return [f"{key}: {row['words']}" for key, row in self.cases.items() if not row["survived"]]


def table(report: Report, faults: dict[str, str]) -> str:
    """The report as Markdown, a row a fault; `faults` says in words what each did, in the order of the rows."""
    lines = ["| fault | times | survived | what happened | seconds to recover, median / longest |", "|---" * 5 + "|"]
    for fault, words in faults.items():
        rows = [row for row in report.cases.values() if row["fault"] == fault]
        if not rows:
            continue
        seconds = [row["recovery"] for row in rows if row["recovery"] is not None]
        spread = f"{statistics.median(seconds):.0f} / {max(seconds):.0f}" if seconds else ""
        survived = sum(row["survived"] for row in rows)
        lines.append(f"| {words} | {len(rows)} | {survived} | {_happened(rows)} | {spread} |")
    return "\n".join(lines)


def _happened(rows: list[dict[str, Any]]) -> str:
    """What happened in the cases of one fault, most frequent first."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["words"]] = counts.get(row["words"], 0) + 1
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    return "; ".join(words if count == len(rows) else f"{count}: {words}" for words, count in ordered)
