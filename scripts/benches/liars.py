"""`scripts/bench liars`: what one lying clinic of five costs on SLAKE, with the mean and with two robust rules.

Five clinics with a fifth of the images each, `alternating`; the first one lies in ways that no check of a single reply
can tell (`slake_lies`). Base, test questions, resuming and intervals are those of `scripts/bench slake`.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from scripts.benches import slake_runs, slake_table
from scripts.benches.slake import SETTINGS, rate_of
from scripts.benches.slake_case import CHANCE, Case, rows
from scripts.benches.slake_lies import LIES

RULES: dict[str, dict[str, int]] = {  # how the five replies become one
    "mean": {},
    "trimmed-mean": {"cut": 1},
    "multi-krum": {"aside": 1},
}
HONEST = "honest"
WAYS = [f"{lie}-{rule}" for lie in (HONEST, *LIES) for rule in RULES]
_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--data", type=_PATH, required=True, help="SLAKE's folder (en_train.json, en_validate.json, imgs/).")
@click.option("--out", type=_PATH, required=True, help="Folder for the cases and report.json.")
@click.option("--base", type=_PATH, default=Path("model/reference_few"), show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--rate", default="4e-3", show_default=True, help="As in `scripts/bench slake`.")
@click.option("--rounds", default=6, show_default=True)
@click.option("--steps", default=24, show_default=True, help="Optimizer steps of a clinic in a round.")
@click.option("--only", type=click.Choice(WAYS), multiple=True, help="Again for more.  [default: all]")
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True)
@click.option("--minutes", type=float, help="Begin no case after so many; the table then says what is missing.")
def main(data: Path, out: Path, base: Path, seeds: int, rate: str, rounds: int, steps: int, **other: Any) -> None:
    """Measure what a lying clinic costs."""
    (out / "cases").mkdir(parents=True, exist_ok=True)
    settings = {**SETTINGS, **rate_of(rate), "rounds": rounds, "steps": steps}
    wanted = list(cases(base.resolve(), data.resolve(), out.resolve(), seeds, settings))
    wanted = [case for case in wanted if way(case) in (other["only"] or WAYS)]
    slake_runs.run_all(wanted, other["workers"], other["minutes"])
    report = summary(wanted)
    (out / "report.json").write_text(json.dumps({"settings": settings, **report}, indent=1) + "\n", encoding="utf-8")
    click.echo(table(report))


def cases(base: Path, data: Path, out: Path, seeds: int, settings: Mapping[str, Any]) -> Iterator[Case]:
    """Everyone honest, and each lie; each with every rule."""
    for seed in range(1, seeds + 1):
        for lie in ("", *LIES):
            for rule, own in RULES.items():
                chosen = {**settings, "lie": lie, "rule": rule, **own}
                case = Case("alternating", "chance", seed, str(base), str(data), "", chosen)
                yield replace(case, out=str(out / "cases" / f"{way(case)}-{seed}.json"))


def way(case: Case) -> str:
    """The lie and the rule of a case."""
    return f"{case.settings['lie'] or HONEST}-{case.settings['rule']}"


def summary(wanted: Sequence[Case]) -> dict[str, Any]:
    """Percent right of each way, and its difference from the plain mean of honest clinics, over the seeds there are."""
    _, test = rows(wanted[0])
    groups = {row.id: row.group for row in test}
    ids = sorted(groups)
    found: dict[tuple[str, str], dict[int, slake_table.Right]] = {}
    away: dict[tuple[str, str], list[list[list[int]]]] = {}  # who was set aside, for each seed and round
    for case in wanted:
        if slake_runs.done(case):
            key, result = (case.settings["lie"], case.settings["rule"]), slake_runs.result(case)
            found.setdefault(key, {})[case.seed] = result["right"]
            away.setdefault(key, []).append(result.get("aside", []))
    lines, honest = [], found.get(("", "mean"), {})
    for (lie, rule), runs in found.items():
        mean = slake_table.mean_right(list(runs.values()), ids)
        row: dict[str, Any] = {"lie": lie, "rule": rule, "seeds": len(runs), "percent": 100 * mean.mean()}
        if rounds := [gone for each in away[lie, rule] for gone in each]:
            row["rounds"], row["liar_set_aside"] = len(rounds), sum(0 in gone for gone in rounds)
        if both := sorted(set(runs) & set(honest)):
            here, there = (slake_table.mean_right([of[seed] for seed in both], ids) for of in (runs, honest))
            lost = here - there
            row["difference"] = slake_table.share(lost, lost, [groups[i] for i in ids])
        lines.append(row)
    return {"rows": len(ids), "clinics": len(CHANCE), "lines": lines}


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| one clinic of five | together by | seeds | right % | against honest clinics, 95 % interval | set aside |",
        "|---" * 6 + "|",
    ]
    for row in report["lines"]:
        gap = row.get("difference") or {}
        told = f"{gap['points']:+.1f} [{gap['low']:+.1f}, {gap['high']:+.1f}]" if gap else ""
        aside = f"{row['liar_set_aside']} of {row['rounds']} rounds" if row["lie"] and "rounds" in row else ""
        name = f"{row['lie'] or HONEST} | {row['rule']} | {row['seeds']}"
        lines.append(f"| {name} | {row['percent']:.1f} | {told} | {aside} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
