"""A passport as a page for people: PASSPORT.txt is this text of the record, and nothing that the record does not say.

Texts in a record may come from elsewhere, so only printable characters are shown. Not here: signing and checking
(`model.passport`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

WIDTH = 15
_VERDICTS = {"passed": "examined and released", "not examined": "released without an examination", "refused": "REFUSED"}


def page(record: Mapping[str, Any], *, signed: bool) -> str:
    """The whole page. Never raises for a record with missing or odd entries."""
    return "\n".join(_plain(line) for line in _lines(record, signed)) + "\n"


def _lines(record: Mapping[str, Any], signed: bool) -> Iterator[str]:
    yield f"Passport of the adapter of round {record.get('round')}"
    yield ""
    verdict = str(record.get("verdict"))
    yield _row("Verdict", _VERDICTS.get(verdict, verdict))
    yield _row("Because", record.get("summary"))
    yield _row("Issued", f"{record.get('issued_at')}, number {record.get('serial')}, {record.get('kind')}")
    yield _row("Adapter", f"sha256 {record.get('adapter_sha256')}")
    yield _row("For the base", f"sha256 {record.get('base_sha256')}")
    yield _row("Contributed", ", ".join(map(str, _list(record, "contributed"))) or "nobody")
    yield _row("Signature", "in passport.json" if signed else "none: nobody vouches for this adapter")
    parts = {"Rules": _rules, "Where it was examined": _places, "Not counted": _silent}
    for title, rows in parts.items():
        found = list(rows(record))
        if found:
            yield from ("", title, *(f"  {row}" for row in found))
    yield ""
    yield "Right answers are those that equal the whole reference. This says nothing about patients not in these sets."


def _row(name: str, value: object) -> str:
    return f"{name:<{WIDTH}}{value}"


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    found = record.get(name)
    return found if isinstance(found, list) else []


def _rules(record: Mapping[str, Any]) -> Iterator[str]:
    for rule in _list(record, "rules"):
        if isinstance(rule, dict):
            yield f"{'kept  ' if rule.get('kept') else 'BROKEN'} {rule.get('words')}"


def _places(record: Mapping[str, Any]) -> Iterator[str]:
    for place in _list(record, "places"):
        if isinstance(place, dict):
            right, share = place.get("right") or {}, place.get("share", 0)
            yield (
                f"{place.get('name')}: {place.get('rows')} questions on {place.get('groups')} pictures at "
                f"{place.get('bits')} bits; right without adapter {right.get('base')}, installed before "
                f"{right.get('installed')}, this one {right.get('candidate')} ({place.get('lost')} lost, "
                f"{place.get('gained')} gained); share in the total {share:.0%}"
                if isinstance(share, (int, float))
                else f"{place.get('name')}"
            )


def _silent(record: Mapping[str, Any]) -> Iterator[str]:
    for place in _list(record, "silent"):
        if isinstance(place, dict):
            yield f"{place.get('name')}: {place.get('reason')}"


def _plain(line: str) -> str:
    return "".join(c if c.isprintable() else " " for c in line)[:2000].rstrip()
