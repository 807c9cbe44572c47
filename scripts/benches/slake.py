"""`scripts/bench slake`: every aggregation beside local and pooled training on SLAKE, split by modality and by organ.

Three clinics each, on images that the base (`model/reference_few`) was not trained on; SLAKE's en_validate is asked at
the end, at 4 bits. Each way of training has the learning rate with which it answers a fifth of the training images best
when trained on the rest (by modality, the mean of `--tries`; a local adapter has that of `brief`). Each case runs in a
process of its own (`slake_case`), as many as there are cores, and is kept, round by round: the same command goes on
where it was stopped. Intervals draw images, not seeds; a clinic's own score counts its part of the test rows. Every
adapter takes as many steps as one clinic; a pooled one has the examples of all clinics in each, a brief one, pooled
too, those of one.
"""

import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from scripts.benches import slake_runs, slake_table, slake_together
from scripts.benches.slake_case import SPLITS, Case
from server.aggregate import MODES

_PATH = click.Path(path_type=Path)
SETTINGS = {"targets": "decoder+projector", "rank": 16, "alpha": 16.0, "batch": 24, "mu": 0.0}
RATES = "LR, LR:RATIO (of B's rate, LoRA+) or LR:RATIO:FINAL (in the last round) to choose from; or WAY=RATE."
TUNED = ("pooled", "brief", *MODES)
Rate = dict[str, float]  # lr of the factors A, lr_ratio of B's to it, lr_final (in rounds): the share left in the last


@click.command()
@click.option("--data", type=_PATH, required=True, help="SLAKE's folder (en_train.json, en_validate.json, imgs/).")
@click.option("--out", type=_PATH, required=True, help="Folder for the cases and report.json.")
@click.option("--base", type=_PATH, default=Path("model/reference_few"), show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--rates", default="1e-3:4,2e-3,2e-3:4:0.1", show_default=True, help=RATES)
@click.option("--tries", default=1, show_default=True, help="Trainings with each rate to choose from.")
@click.option("--rounds", default=12, show_default=True)
@click.option("--steps", default=24, show_default=True, help="Optimizer steps of a clinic in a round.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default=True,
    help="Cases at a time, one core each.",
)
@click.option("--side-by-side", is_flag=True, help="Clinics of a case train at the same time, a core each.")
@click.option("--together", is_flag=True, help="Train a way's cases in one process: for one GPU, small models.")
@click.option("--only", default="", help="Ways of training, by commas (pooled,alternating,local); else every one.")
@click.option("--minutes", type=float, help="Begin no case after so many; the table then says what is missing.")
def main(data: Path, out: Path, base: Path, seeds: int, workers: int, minutes: float | None, **chosen: Any) -> None:
    """Compare local, federated and pooled training on SLAKE."""
    if chosen["together"] and minutes is not None:
        raise click.UsageError("--minutes does not go with --together; stop it with Ctrl-C, and run it again to go on.")
    (out / "cases").mkdir(parents=True, exist_ok=True)
    began, places = time.monotonic(), (base.resolve(), data.resolve(), out.resolve())
    settings = SETTINGS | {key: chosen[key] for key in ("rounds", "steps")}
    only = chosen["only"].split(",") if chosen["only"] else [*TUNED, "local"]
    ways = [way for way in TUNED if way in only or (way == "brief" and "local" in only)]
    rates, given = rates_of(chosen["rates"])
    open_ways = [way for way in ways if way not in given] if len(rates) > 1 else []
    tried = list(tuning(*places, settings, open_ways, rates, chosen["tries"]))
    how = ("--side-by-side",) if chosen["side_by_side"] else ()
    if chosen["together"]:
        slake_together.train_all(tried)
    slake_runs.run_all(tried, workers, minutes, *how)
    scores = scored(tried)
    best = {way: max(rates, key=lambda rate: scores[way][named(rate)]) for way in scores}
    own = {way: given.get(way) or best.get(way) or (rates or [{}])[0] for way in ways}
    if lacking := [way for way in ways if not own[way]]:
        raise click.BadParameter(f"--rates says nothing about {lacking[0]}; add {lacking[0]}=LR, or one for all ways.")
    wanted = [case for case in cases(*places, seeds, settings, own) if case.what.split()[0] in ("none", *only)]
    if chosen["together"]:
        slake_together.train_all(wanted)
    slake_runs.run_all(wanted, workers, None if minutes is None else minutes - (time.monotonic() - began) / 60, *how)
    report = {"tried": scores, **slake_table.summary(wanted, settings)}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(slake_table.table(report))


def rate_of(text: str) -> Rate:
    """ "LR", "LR:RATIO" or "LR:RATIO:FINAL" as settings of a case. Raises BadParameter."""
    try:
        parts = [float(part) for part in text.split(":")]
        lr, ratio, final = [*parts, 1.0, 1.0][: max(3, len(parts))]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no rate; write LR, LR:RATIO or LR:RATIO:FINAL.") from None
    return {"lr": lr, "lr_ratio": ratio, "lr_final": final}


def rates_of(text: str) -> tuple[list[Rate], dict[str, Rate]]:
    """Rates to choose from, and those given for one way (WAY=RATE). Raises BadParameter."""
    parts = text.split(",")
    given = dict(part.split("=", 1) for part in parts if "=" in part)
    if odd := sorted(set(given) - set(TUNED)):
        raise click.BadParameter(f"{odd[0]!r} has no rate of its own; there are {', '.join(TUNED)}.")
    return [rate_of(part) for part in parts if "=" not in part], {way: rate_of(rate) for way, rate in given.items()}


def named(rate: Mapping[str, Any]) -> str:
    """The rate as `rate_of` reads it."""
    return f"{rate['lr']:g}:{rate['lr_ratio']:g}:{rate['lr_final']:g}"


def tuning(
    base: Path,
    data: Path,
    out: Path,
    settings: Mapping[str, Any],
    ways: Sequence[str],
    rates: Sequence[Rate],
    tries: int = 1,
) -> Iterator[Case]:
    """Each way of training with each of the rates, asked about training images that it was not shown."""
    for seed, rate, way in itertools.product(range(1, tries + 1), rates, ways):
        case = Case(way, "modality", seed, str(base), str(data), "", sized(way, {**settings, **rate}), tune=True)
        yield replace(case, out=str(out / "cases" / f"{case.name}.json"))


def scored(tried: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Percent right for each way and rate, the mean over its tries. Raises ClickException where one is missing."""
    if not all(slake_runs.done(case) for case in tried):
        raise click.ClickException("The time was up before learning rates could be chosen; run this again to go on.")
    found: dict[str, dict[str, list[float]]] = {}
    for case in tried:
        right = slake_table.percent(slake_runs.result(case)["right"])
        found.setdefault(case.what, {}).setdefault(named(case.settings), []).append(right)
    return {way: {rate: fmean(each) for rate, each in rates.items()} for way, rates in found.items()}


def sized(way: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a way of training: pooled data are taken in batches of all clinics' examples."""
    clinics = len(next(iter(SPLITS.values()))[1]) if way == "pooled" else 1
    return {**settings, "batch": settings["batch"] * clinics}


def cases(
    base: Path, data: Path, out: Path, seeds: int, settings: Mapping[str, Any], rates: Mapping[str, Rate]
) -> Iterator[Case]:
    """Every case, seed by seed, so that a run that is stopped has whole seeds."""

    def case(what: str, split: str, seed: int) -> Case:
        place = out / "cases" / f"{Case(what, split, seed, '', '', '').name}.json"
        own = sized(what, {**settings, **rates.get("brief" if what.startswith("local ") else what, {})})
        return Case(what, split, seed, str(base), str(data), str(place), own)

    yield case("none", "modality", 0)
    for seed in range(1, seeds + 1):
        yield case("pooled", "modality", seed)
        yield case("brief", "modality", seed)
        for split, (_, clinics) in SPLITS.items():
            for what in (*MODES, *(f"local {name}" for name in clinics)):
                yield case(what, split, seed)


if __name__ == "__main__":
    main()
