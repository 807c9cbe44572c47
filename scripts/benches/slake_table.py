"""The table of `scripts/bench slake`: percent right, intervals over images, and the share of what pooling gains."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scripts.benches.slake_case import SPLITS, Case, clinic_of, rows
from scripts.benches.slake_runs import done, result
from server.aggregate import MODES

_DRAWS = 4000  # bootstrap draws of whole images
Right = Mapping[str, bool]
Seeds = Mapping[int, Right]  # what each seed answered right
BEST = ("pooled", "brief")  # what the others' gain is held against


def summary(wanted: Sequence[Case], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Percent right with intervals for every way of training, in all and by clinic, over the seeds that are there."""
    there = {case.name: result(case) for case in wanted if done(case)}
    _, test = rows(wanted[0])
    report: dict[str, Any] = {"settings": dict(settings), "rows": len(test), "splits": {}}
    seeds = sorted({case.seed for case in wanted if case.seed})
    for split, (_, clinics) in SPLITS.items():
        groups = {row.id: row.group for row in test}
        places = {row.id: clinic_of(row, split) for row in test}
        runs = {"none": {0: there["none"]["right"]} if "none" in there else {}}
        for what in (*BEST, *MODES, *(f"local {name}" for name in clinics)):
            named = [Case(what, split, seed, "", "", "").name for seed in seeds]
            runs[what] = {seed: there[name]["right"] for seed, name in zip(seeds, named, strict=True) if name in there}
        found = {what: _row(several, runs, groups, places) for what, several in runs.items() if several}
        for what in MODES:
            facts = [there[n] for n in (Case(what, split, s, "", "", "").name for s in seeds) if n in there]
            for key in ("bytes_up", "distance"):
                if facts:
                    found[what][key] = float(np.mean([fact[key] for fact in facts]))
        report["splits"][split] = found
    return report


def _row(
    several: Seeds, runs: Mapping[str, Seeds], groups: Mapping[str, str], places: Mapping[str, str]
) -> dict[str, Any]:
    """Mean over seeds: percent right, its interval, each clinic's, and the shares of what both ways of pooling gain."""
    from model import metrics

    ids = sorted(groups)
    mean = mean_right(list(several.values()), ids)
    whole = metrics.estimate(list(mean), [groups[i] for i in ids], _DRAWS)
    assert whole is not None
    own = {}
    for place in sorted(set(places.values())):
        own[place] = 100 * float(np.mean([value for value, i in zip(mean, ids, strict=True) if places[i] == place]))
    row: dict[str, Any] = {"seeds": len(several), "percent": whole.percent, "low": whole.low, "high": whole.high}
    row |= {"clinics": own}
    for best in BEST if runs["none"] else ():
        if both := sorted(set(several) & set(runs[best])):  # without an adapter there is no seed, and no share
            start = mean_right(list(runs["none"].values()), ids)
            gained, most = (mean_right([of[seed] for seed in both], ids) - start for of in (several, runs[best]))
            row[best] = share(gained, most, [groups[i] for i in ids])
    return row


def percent(right: Right) -> float:
    """Percent answered right."""
    return 100 * sum(right.values()) / len(right)


def mean_right(several: Sequence[Right], ids: Sequence[str]) -> np.ndarray:
    """Share of the runs in which each question was answered right."""
    return np.mean([[run[i] for i in ids] for run in several], axis=0)


def share(gained: np.ndarray, pooled: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    """Points gained and the share of what pooling gains, with bootstrap intervals over images.

    The share is None where pooling gains less than a point; its interval is that of a ratio and can be very wide.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.stack([np.bincount(index, part, len(names)) for part in (gained, pooled)], 1)
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=_DRAWS)
    count = draws @ np.bincount(index, minlength=len(names))
    totals = (draws @ sums) / count[:, None]
    points, room = 100 * float(gained.mean()), 100 * float(pooled.mean())
    low, high = (float(value) for value in 100 * np.percentile(totals[:, 0], [2.5, 97.5]))
    found: dict[str, Any] = {"points": points, "low": low, "high": high, "share": None}
    if room >= 1:
        safe = np.where(totals[:, 1] > 0, totals[:, 1], np.nan)
        ends = np.nanpercentile(totals[:, 0] / safe, [2.5, 97.5])
        found |= {"share": points / room, "share_low": float(ends[0]), "share_high": float(ends[1])}
    return found


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    title = "Right % on training images set aside, by learning rate of A, ratio of B's to it, share left at the end:"
    lines = [title, ""] if report["tried"] else []
    for way, scores in report["tried"].items():
        lines.append(f"- {way}: " + ", ".join(f"{rate} {score:.1f}" for rate, score in scores.items()))
    lines += [""] if lines else []
    for split, found in report["splits"].items():
        names = list(next(iter(found.values()))["clinics"]) if found else []
        lines += [f"SLAKE by {split}, {report['rows']} test questions:", ""]
        columns = ["adapter", "seeds", "right %, 95 % interval", *names, "gain", *(f"of {best}'s" for best in BEST)]
        lines += [f"| {' | '.join(columns)} | KiB up |", "|---" * (len(columns) + 1) + "|"]
        lines += [_line(what, row, names) for what, row in found.items()]
        lines.append("")
    return "\n".join(lines)


def _line(what: str, row: Mapping[str, Any], names: Sequence[str]) -> str:
    """One way of training."""
    parts = [what, str(row["seeds"]), f"{row['percent']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"]
    parts += [f"{row['clinics'][name]:.1f}" for name in names]
    gain = next((row[best] for best in BEST if best in row and what != "none"), None)
    parts.append(f"{gain['points']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]" if gain else "")
    for found in (row.get(best) or {} for best in BEST):
        shown = found.get("share") is not None and what not in ("none", *BEST)
        low, high = (f"{100 * found[key]:.0f}" if shown else "" for key in ("share_low", "share_high"))
        parts.append(f"{100 * found['share']:.0f} % [{low}, {high}]" if shown else "")
    parts.append(f"{row['bytes_up'] / 1024:.0f}" if "bytes_up" in row else "")
    return f"| {' | '.join(parts)} |"
