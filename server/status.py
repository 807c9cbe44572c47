"""What a federation has done so far, put together from its events and tables: for `afya-server status` and the page.

Only reads, and needs neither a running server nor the rounds' weights. Everything that clinics said arrives here as
plain text and stays that. Not here: what is going on at this second; when a clinic was last heard of is up to half a
minute old (`server.contacts`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server import contacts, events, guard, quota, registry
from server.follow import waiting
from server.strategy import NOT_GIVEN, SILENT

AWAY = (SILENT, NOT_GIVEN)  # reasons that are no sign of life
RELEASES = ("release", "rollback", "not-released")


@dataclass
class Clinic:
    """One clinic: when it was last there, what it sent, how right the model was on its sealed set."""

    name: str
    registered: bool = False
    revoked: str = ""  # when its key was revoked; empty: it was not
    last_seen: str = ""
    accepted: int = 0
    rejected: int = 0
    bytes_up: int = 0
    seconds: float = 0.0  # in all, as the clinic measured its training
    examples: int = 0  # in its last accepted reply
    cases: int = 0  # likewise: patients, or pictures where patients are not known
    loss_before: float | None = None
    loss_after: float | None = None
    installed: str = ""  # what it said when a release was brought to it
    accuracy: list[dict[str, Any]] = field(default_factory=list)  # round, rows, installed %, candidate %


@dataclass(frozen=True)
class Round:
    """One finished round: whether it changed the adapter and why, how long it took and what it moved."""

    number: int
    at: str
    factor: str
    changed: bool
    reason: str
    accepted: int
    rejected: int
    seconds: float
    bytes_down: int
    bytes_up: int
    loss_before: float | None
    loss_after: float | None


@dataclass(frozen=True)
class Refusal:
    """A reply that did not count, or a release that a clinic did not take."""

    at: str
    round: int
    clinic: str
    reason: str


@dataclass
class Release:
    """An adapter that was brought to the clinics, an earlier one brought again, or one that was held back."""

    at: str
    round: int
    kind: str  # release, rollback, not-released
    words: str
    installed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Status:
    """The whole federation; `running` is the round that has begun and not ended, `trouble` what went wrong last."""

    root: str
    clinics: list[Clinic]
    rounds: list[Round]
    refusals: list[Refusal]
    releases: list[Release]
    running: int | None
    trouble: str
    waiting: str = ""

    @property
    def empty(self) -> bool:
        """Whether nothing at all is known yet."""
        return not (self.clinics or self.rounds or self.releases or self.running or self.waiting or self.trouble)


def read(state: Path, root: Path | None = None) -> Status:
    """Status of the federation whose server's folder is `state` and whose rounds lie in `root` (STATE/rounds)."""
    where = root or state / "rounds"
    reader = _Reader(where)
    for name in registry.registered(state):
        reader.clinic(name).registered = True
    for row in guard.read_revoked(state).values():
        clinic = reader.clinic(row["clinic"])
        clinic.revoked = "" if clinic.registered else row["at"]
    for event in events.read(where)[0]:
        reader.take(event)
    for name, at in contacts.read(state).items():
        if name in reader.clinics:
            reader.clinic(name).last_seen = max(reader.clinic(name).last_seen, at)
    reader.trouble = quota.full(state) or reader.trouble
    return reader.status()


class _Reader:
    """Takes the events one by one. An event that lacks what it should have counts as trouble, never as a crash."""

    def __init__(self, root: Path) -> None:
        self.root, self.clinics = root, dict[str, Clinic]()
        self.rounds: dict[int, Round] = {}
        self.refusals: list[Refusal] = []
        self.releases: list[Release] = []
        self.accepted: list[dict[str, Any]] = []
        self.refused = 0
        self.running: int | None = None
        self.trouble = self.waiting = ""

    def clinic(self, name: str) -> Clinic:
        return self.clinics.setdefault(str(name), Clinic(str(name)))

    def take(self, event: dict[str, Any]) -> None:
        """One event, by its kind; kinds that say nothing about the status are passed over."""
        kind = str(event.get("event", ""))
        handlers = {
            "round": self._round,
            "waiting": self._waiting,
            "accepted": self._accepted,
            "rejected": self._rejected,
            "set-aside": self._set_aside,
            "round-done": self._round_done,
            "resumed": self._resumed,
            "examined": self._examined,
            "installed": self._installed,
            "not-installed": self._not_installed,
            "failed": self._failed,
            "finished": self._finished,
            "unreadable": self._unreadable,
            **dict.fromkeys(RELEASES, self._released),
        }
        try:
            if kind in handlers:
                handlers[kind](event)
        except (KeyError, TypeError, ValueError) as error:
            self.trouble = f"An event of kind {kind!r} cannot be read ({type(error).__name__}: {error})."

    def status(self) -> Status:
        clinics = sorted(self.clinics.values(), key=lambda clinic: clinic.name)
        rounds = [self.rounds[number] for number in sorted(self.rounds)]
        now = (self.running, self.trouble, self.waiting)
        return Status(str(self.root), clinics, rounds, self.refusals, self.releases, *now)

    def _seen(self, names: Iterable[str], event: dict[str, Any]) -> None:
        for name in names:
            self.clinic(name).last_seen = str(event.get("at", ""))

    def _waiting(self, event: dict[str, Any]) -> None:
        self.waiting = waiting({**event, "clinics": list(event["clinics"])})

    def _round(self, event: dict[str, Any]) -> None:
        self.waiting = ""
        self.running, self.accepted, self.refused = int(event["round"]), [], 0
        self._seen(event["clinics"], event)

    def _accepted(self, event: dict[str, Any]) -> None:
        clinic = self.clinic(event["clinic"])
        clinic.accepted += 1
        clinic.bytes_up += int(event.get("bytes", 0))
        clinic.seconds += float(event.get("seconds", 0.0))
        clinic.examples, clinic.cases = int(event.get("examples", 0)), int(event.get("cases", 0))
        clinic.loss_before, clinic.loss_after = event.get("loss-before"), event.get("loss-after")
        self.accepted.append(event)
        self._seen([event["clinic"]], event)

    def _rejected(self, event: dict[str, Any]) -> None:
        self.clinic(event["clinic"]).rejected += 1
        self.refused += 1
        self._refusal(event, str(event.get("reason", "")))
        if event.get("reason") not in AWAY:
            self._seen([event["clinic"]], event)

    def _set_aside(self, event: dict[str, Any]) -> None:
        """A reply that had been accepted and then was the furthest from the others'."""
        self.accepted = [other for other in self.accepted if other["clinic"] != event["clinic"]]
        self.clinic(event["clinic"]).accepted -= 1
        self._rejected(event)

    def _refusal(self, event: dict[str, Any], reason: str) -> None:
        number = int(event.get("round") or self.running or max(self.rounds, default=0))
        self.refusals.append(Refusal(str(event.get("at", "")), number, str(event["clinic"]), reason))

    def _round_done(self, event: dict[str, Any]) -> None:
        number = int(event["round"])
        self.rounds[number] = Round(
            number,
            str(event.get("at", "")),
            str(event["factor"]),
            bool(event["changed"]),
            str(event["reason"]),
            len(self.accepted),
            self.refused,
            float(event["seconds"]),
            int(event["bytes_down"]),
            int(event["bytes_up"]),
            _mean(self.accepted, "loss-before"),
            _mean(self.accepted, "loss-after"),
        )
        self.running, self.accepted, self.refused = None, [], 0

    def _resumed(self, event: dict[str, Any]) -> None:
        self.running, self.trouble, self.waiting = None, "", ""

    def _released(self, event: dict[str, Any]) -> None:
        words = str(event.get("summary") or event.get("reason") or "")
        row = Release(str(event.get("at", "")), int(event.get("round", 0)), str(event["event"]), words)
        self.releases.append(row)

    def _installed(self, event: dict[str, Any]) -> None:
        self._answered(event, True)

    def _not_installed(self, event: dict[str, Any]) -> None:
        self._answered(event, False)

    def _answered(self, event: dict[str, Any], took: bool) -> None:
        """A clinic's word about the release that was brought to it."""
        name, detail = str(event["clinic"]), str(event.get("detail", ""))
        if self.releases:
            (self.releases[-1].installed if took else self.releases[-1].refused).append(name)
        if took:
            self.clinic(name).installed = detail
        else:
            self._refusal(event, f"did not install: {detail}")
        if detail not in AWAY:
            self._seen([name], event)

    def _examined(self, event: dict[str, Any]) -> None:
        rows, right = int(event["rows"]), event["right"]
        share = {key: round(100 * int(right[key]) / rows, 1) for key in ("installed", "candidate") if rows}
        self.clinic(event["clinic"]).accuracy.append({"round": int(event["round"]), "rows": rows, **share})
        self._seen([event["clinic"]], event)

    def _failed(self, event: dict[str, Any]) -> None:
        self.running, self.waiting = None, ""
        self.trouble = f"The last run has failed: {event.get('reason', 'it says no reason')}"

    def _finished(self, event: dict[str, Any]) -> None:
        self.running, self.trouble = None, ""

    def _unreadable(self, event: dict[str, Any]) -> None:
        self.trouble = f"{events.FILE} holds a line that cannot be read: {event.get('line', '')!r}."


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Mean of one metric over the accepted replies that have it, weighted by their examples."""
    known = [(int(row.get("examples", 1)), float(row[key])) for row in rows if key in row]
    total = sum(weight for weight, _ in known)
    return sum(weight * value for weight, value in known) / total if total else None
