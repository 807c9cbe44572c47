"""From a checkpoint to the kiosks: examine the candidate, sign its passport or refuse it, and bring it to the clinics.

A candidate is examined by every connected clinic on its sealed set and by the server on its own data, if it has any.
It is released with a passport, or laid into refused/ with the reasons, and then the last good release stays where it
is. `rollback` issues an earlier release again, under a new number. Numbers only rise, by the clock where the folder was
lost, so that a clinic can tell an old release that is played back from a new one. Not here: the rules
(`server.candidate`), and rounds: they go on from their own checkpoint, whatever was released.
"""

import datetime
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model import adapters, passport
from model.files import write_atomic
from server import candidate, gate_data, release, signing
from server.candidate import Place, Thresholds
from server.checkpoint import RoundCheckpoint
from server.office import ISSUED, Office, current, history, issued, move, refused_before, settle
from server.settings import SettingsRejected
from server.strategy import SILENT

RELEASE_SECONDS = 600.0  # longest wait for the clinics to install; one that is away gets the next release


def examined(office: Office, folder: Path, now: RoundCheckpoint) -> dict[str, Any]:
    """Examine the candidate in `folder`, built from a checkpoint; returns the record of its passport."""
    s = office.settings
    limits = Thresholds(s.gate_points, s.gate_ece, s.gate_rows, s.gate_reliance)
    places, silent = examine(office, folder, now.round)
    rules = candidate.judge(places, limits)
    verdict, summary = _verdict(s.gate, places, rules)
    evidence = release.evidence(now)
    record = {
        "round": now.round,
        "updates": now.updates,
        "kind": "release",
        "adapter_sha256": adapters.sha256(folder),
        "base_sha256": now.spec.base_sha256,
        "rank": now.spec.rank,
        "alpha": now.spec.alpha,
        "contributed": evidence["contributed"],
        "verdict": verdict,
        "summary": summary,
        "limits": {**asdict(limits), "gate": s.gate},
        "rules": candidate.plain_rules(rules),
        "places": candidate.rows_of(places),
        "silent": silent,
    }
    return record


def _verdict(gate: str, places: list[Place], rules: list[candidate.Rule]) -> tuple[str, str]:
    """Passed, refused or not examined, and the reason as one sentence."""
    broken = [rule.words for rule in rules if not rule.kept]
    if broken:
        return "refused", "; ".join(broken) + "."
    if places:
        rows = sum(place.counts.rows for place in places)
        names = ", ".join(place.name for place in places)
        return "passed", f"Examined on {rows} held-out questions ({names}); every rule was kept."
    if gate == "off":
        return "not examined", "The setting gate is off, so nobody was asked to examine it."
    reason = "Nobody could examine it: no clinic has a sealed set that is large enough and gate-data is empty."
    if gate == "require":
        return "refused", f"{reason} The setting gate requires it."
    return "not examined", reason


def examine(office: Office, folder: Path, number: int) -> tuple[list[Place], list[dict[str, str]]]:
    """Ask every connected clinic and the server's own data; returns the counts and who gave none, with the reason."""
    places: list[Place] = []
    silent: list[dict[str, str]] = []
    if office.settings.gate == "off":
        return places, silent
    clinics, digest = office.clinics(), adapters.sha256(folder)
    waiting = dict(clinics)
    seconds = office.settings.gate_seconds
    for node, reply in office.replies(release.candidate(folder), release.EXAMINE, clinics, number, seconds):
        name = waiting.pop(node)
        found = f"unreadable: {reply}" if isinstance(reply, Exception) else release.counted(reply, digest)
        if isinstance(found, str):
            silent.append({"name": name, "reason": found[:300]})
            office.events.add("not-examined", round=number, clinic=name, reason=found[:300])
            continue
        places.append(Place(name, found))
        right = {"installed": found.installed.before, "candidate": found.installed.after}
        office.events.add("examined", round=number, clinic=name, rows=found.rows, right=right)
    silent += [{"name": name, "reason": SILENT} for name in sorted(waiting.values())]
    if office.settings.gate_data:
        own = gate_data.examine(office.settings, current(office), folder)
        places.append(Place("server", own))
        right = {"installed": own.installed.before, "candidate": own.installed.after}
        office.events.add("examined", round=number, clinic="server", rows=own.rows, right=right)
    return sorted(places, key=lambda place: place.name), sorted(silent, key=lambda row: row["name"])


def conclude(office: Office, folder: Path, record: dict[str, Any]) -> Path | None:
    """Move a candidate where it belongs, with its signed passport; its folder, None when it was refused."""
    refused = record["verdict"] == "refused"
    earlier = [] if refused else history(office)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    last = max((row["serial"] for row in earlier), default=0)
    record = {**record, "issued_at": now, "serial": 0 if refused else max(last + 1, int(time.time()))}
    key = office.settings.signing_key
    passport.write(folder, passport.sign(record, signing.load(Path(key)) if key and not refused else None))
    target = office.root / ("refused" if refused else release.FOLDER) / folder.name
    move(folder, target)
    if refused:
        office.events.add("not-released", round=record["round"], reason=record["summary"], folder=str(target))
        return None
    shutil.rmtree(office.root / "refused" / folder.name, ignore_errors=True)  # examined anew, and no longer so
    names = ("serial", "round", "adapter_sha256", "issued_at", "kind", "verdict")
    rows = [*earlier, {**{name: record[name] for name in names}, "brought": False}]
    write_atomic(office.releases / ISSUED, (json.dumps(rows, indent=1) + "\n").encode())
    return target


def bring(office: Office, folder: Path, record: Mapping[str, Any]) -> None:
    """Bring a release folder to every connected clinic and record what each said."""
    clinics = office.clinics()
    office.events.add(
        str(record["kind"]),
        round=record["round"],
        folder=str(folder),
        clinics=sorted(clinics.values()),
        verdict=record["verdict"],
        summary=record["summary"],
    )
    waiting = dict(clinics)
    seconds = min(office.settings.round_deadline, RELEASE_SECONDS)
    for node, reply in office.replies(release.content(folder), release.INSTALL, clinics, record["round"], seconds):
        del waiting[node]
        done, words = (False, str(reply)) if isinstance(reply, Exception) else release.verdict(reply)
        office.events.add("installed" if done else "not-installed", clinic=clinics[node], detail=words)
    for name in sorted(waiting.values()):
        office.events.add("not-installed", clinic=name, detail=SILENT)
    rows = history(office)
    if clinics and rows:
        rows[-1] = {**rows[-1], "brought": True}
        write_atomic(office.releases / ISSUED, (json.dumps(rows, indent=1) + "\n").encode())


def _once(office: Office, candidate: Path, now: RoundCheckpoint, row: Mapping[str, Any]) -> None:
    """An adapter is not released twice, but brought again where a crash came before the clinics had it."""
    shutil.rmtree(candidate)
    folder = current(office)
    if folder and row == history(office)[-1] and not row.get("brought", True) and office.clinics():
        bring(office, folder, passport.read((folder / passport.FILE).read_text(encoding="utf-8"))[0])
        return
    reason = f"this adapter was released after round {row['round']} already, and no round has changed it since"
    office.events.add("not-released", round=now.round, reason=reason)


def release_now(office: Office, now: RoundCheckpoint) -> None:
    """Examine, then release or refuse, the adapter of a checkpoint."""
    if now.updates == 0:
        office.events.add("not-released", round=now.round, reason="no round has changed the factors yet")
        return
    folder = release.build(office.root, now, "candidates")
    known = issued(office, adapters.sha256(folder))
    if known and (known["verdict"] == "passed" or office.settings.gate == "off"):
        _once(office, folder, now, known)
        return
    record = examined(office, folder, now)
    if known and record["verdict"] == "not examined":
        _once(office, folder, now, known)
        return
    if (
        record["verdict"] == "not examined"
        and office.settings.gate != "off"
        and (words := refused_before(office, folder))
    ):
        shutil.rmtree(folder)
        reason = f"It was refused before, and nobody could examine it again: {words}"
        office.events.add("not-released", round=now.round, reason=reason)
        return
    target = conclude(office, folder, record)
    if target is not None:
        bring(office, target, record)


def rollback(office: Office, to: int) -> None:
    """Issue an earlier release again (`to`: its round; -1: the one before) and bring it to the clinics.

    Raises SettingsRejected when there is none.
    """
    start = time.monotonic()
    rows = history(office)
    rounds = sorted({int(row["round"]) for row in rows})
    now = int(rows[-1]["round"]) if rows else 0
    before = [number for number in rounds if number < now]
    wanted = (before[-1] if before else None) if to == -1 else (to if to in rounds else None)
    if wanted is None:
        listed = ", ".join(map(str, rounds)) or "none"
        raise SettingsRejected(f"There is no such earlier release in {office.releases}; releases of rounds: {listed}.")
    source = office.releases / f"round-{wanted:05d}"
    settle(source)
    record = passport.read((source / passport.FILE).read_text(encoding="utf-8"))[0]
    known = [row["adapter_sha256"] for row in rows if row["round"] == wanted]
    if adapters.sha256(source) not in known:
        raise SettingsRejected(f"{source} is not what was released; restore it from a copy or choose another round.")
    folder = office.root / "candidates" / source.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in source.iterdir():  # onto the disk, since the copy soon takes the place of the only other one
        write_atomic(folder / file.name, file.read_bytes())
    record = {**record, "kind": "rollback", "summary": f"Rolled back from round {now}. First: {record['summary']}"}
    target = conclude(office, folder, record)
    assert target is not None
    bring(office, target, record)
    office.events.add("rolled-back", round=wanted, before=now, seconds=round(time.monotonic() - start, 2))
