"""`scripts/bench slake`: every aggregation beside local and pooled training on SLAKE, split by modality and by organ.

Three clinics each, on images that the base (`model/reference_few`) was not trained on; SLAKE's en_validate is asked at
the end, at 4 bits. The learning rate is the one with which pooled training answers a fifth of the training images best,
trained on the rest. Each case runs in a process of its own (`slake_case`), as many as there are cores, and is kept: the
same command goes on where it was stopped. Intervals draw images, not seeds; a clinic's own score counts its part of the
test rows. Federated and pooled adapters take as many steps in all; a local one takes as many as its clinic does.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from scripts.benches.slake_case import SPLITS, Case, clinic_of, rows
from server.aggregate import MODES

_PATH = click.Path(path_type=Path)
_DRAWS = 4000  # bootstrap draws of whole images
SETTINGS = {"targets": "decoder+projector", "rank": 16, "alpha": 16.0, "batch": 24, "mu": 0.0}
Right = Mapping[str, bool]


@click.command()
@click.option("--data", type=_PATH, required=True, help="SLAKE's folder (en_train.json, en_validate.json, imgs/).")
@click.option("--out", type=_PATH, required=True, help="Folder for the cases and report.json.")
@click.option("--base", type=_PATH, default=Path("model/reference_few"), show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--rates", default="1e-3,2e-3,4e-3", show_default=True, help="Learning rates to choose from, or one.")
@click.option("--rounds", default=12, show_default=True)
@click.option("--steps", default=24, show_default=True, help="Optimizer steps of a clinic in a round.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default=True,
    help="Cases at a time, one core each.",
)
@click.option("--only", default="", help="Ways of training, by commas (pooled,alternating,local); else every one.")
@click.option("--minutes", type=float, help="Begin no case after so many; the table then says what is missing.")
def main(data: Path, out: Path, base: Path, seeds: int, workers: int, minutes: float | None, **chosen: Any) -> None:
    """Compare local, federated and pooled training on SLAKE."""
    (out / "cases").mkdir(parents=True, exist_ok=True)
    began, places = time.monotonic(), (base.resolve(), data.resolve(), out.resolve())
    settings = {**SETTINGS, "rounds": chosen["rounds"], "steps": chosen["steps"]}
    several = [{**settings, "lr": float(rate)} for rate in chosen["rates"].split(",")]
    tried = list(tuning(*places, several)) if len(several) > 1 else []
    run_all(tried, workers, minutes)
    rates = {case.settings["lr"]: percent(result(case)["right"]) for case in tried if done(case)}
    if len(rates) < len(tried):
        raise click.ClickException("The time was up before a learning rate could be chosen; run this again to go on.")
    settings["lr"] = max(rates, key=lambda rate: rates[rate]) if rates else several[0]["lr"]
    ways = ("none", *chosen["only"].split(","))
    wanted = [case for case in cases(*places, seeds, settings) if not chosen["only"] or case.what.split()[0] in ways]
    run_all(wanted, workers, None if minutes is None else minutes - (time.monotonic() - began) / 60)
    report = {"rates": rates, **summary(wanted, settings)}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(table(report))


def tuning(base: Path, data: Path, out: Path, several: Sequence[dict[str, Any]]) -> Iterator[Case]:
    """Pooled training with each of the settings, asked about training images that it was not shown."""
    for settings in several:
        case = Case("pooled", "modality", 1, str(base), str(data), "", settings, tune=True)
        yield replace(case, out=str(out / "cases" / f"{case.name}.json"))


def percent(right: Right) -> float:
    """Percent answered right."""
    return 100 * sum(right.values()) / len(right)


def cases(base: Path, data: Path, out: Path, seeds: int, settings: Mapping[str, Any]) -> Iterator[Case]:
    """Every case, seed by seed, so that a run that is stopped has whole seeds."""

    def case(what: str, split: str, seed: int) -> Case:
        place = Case(what, split, seed, "", "", "").name
        return Case(what, split, seed, str(base), str(data), str(out / "cases" / f"{place}.json"), dict(settings))

    yield case("none", "modality", 0)
    for seed in range(1, seeds + 1):
        yield case("pooled", "modality", seed)
        for split, (_, clinics) in SPLITS.items():
            for what in (*MODES, *(f"local {name}" for name in clinics)):
                yield case(what, split, seed)


def run_all(wanted: Sequence[Case], workers: int, minutes: float | None) -> None:
    """Do what is not done yet, `workers` at a time. Raises ClickException at the end with the cases that failed."""
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    waiting = [case for case in wanted if not done(case)]
    running: list[tuple[Case, subprocess.Popen[bytes]]] = []
    failed: list[Case] = []
    gpus = itertools.cycle(_gpus())
    with tqdm(total=len(wanted), initial=len(wanted) - len(waiting), unit="case", desc="training") as bar:
        try:
            while running or (waiting and time.monotonic() < end):
                while waiting and len(running) < workers and time.monotonic() < end:
                    running.append((waiting[0], _start(waiting.pop(0), next(gpus))))
                time.sleep(0.2)
                for case, child in list(running):
                    if child.poll() is not None:
                        running.remove((case, child))
                        failed += [case] if child.returncode else []
                        bar.update()
        finally:
            for _, child in running:
                child.kill()
                child.wait()
    if failed:
        raise click.ClickException(f"{len(failed)} cases failed; the first one's log is {_log(failed[0])}.")


def _gpus() -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is to be for one case after the other; None leaves it as it is."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [*named.split(",")] if count > 1 else [None]


def done(case: Case) -> bool:
    """Whether a case has a result of these settings. Raises ClickException for one of others."""
    if not Path(case.out).exists():
        return False
    if case.what != "none" and result(case)["settings"] != case.settings:
        raise click.ClickException(f"{case.out} was made with other settings; choose another --out.")
    return True


def _log(case: Case) -> Path:
    return Path(case.out).with_suffix(".log")


def _start(case: Case, gpu: str | None) -> "subprocess.Popen[bytes]":
    plan = Path(case.out).with_suffix(".case")
    plan.write_text(json.dumps(asdict(case)), encoding="utf-8")
    command = [sys.executable, "-m", "scripts.benches.slake_case", str(plan)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    with _log(case).open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def result(case: Case) -> dict[str, Any]:
    """What a case that is done has found."""
    found: dict[str, Any] = json.loads(Path(case.out).read_bytes())
    return found


def summary(wanted: Sequence[Case], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Percent right with intervals for every way of training, in all and by clinic, over the seeds that are there."""
    there = {case.name: result(case) for case in wanted if done(case)}
    _, test = rows(wanted[0])
    report: dict[str, Any] = {"settings": dict(settings), "rows": len(test), "splits": {}}
    seeds = sorted({case.seed for case in wanted if case.seed})
    for split, (_, clinics) in SPLITS.items():
        groups = {row.id: row.group for row in test}
        places = {row.id: clinic_of(row, split) for row in test}
        runs = {"none": [there["none"]["right"]] if "none" in there else []}
        for what in ("pooled", *MODES, *(f"local {name}" for name in clinics)):
            named = [Case(what, split, seed, "", "", "").name for seed in seeds]
            runs[what] = [there[name]["right"] for name in named if name in there]
        found = {what: _row(several, runs, groups, places) for what, several in runs.items() if several}
        for what in MODES:
            facts = [there[n] for n in (Case(what, split, s, "", "", "").name for s in seeds) if n in there]
            for key in ("bytes_up", "distance"):
                if facts:
                    found[what][key] = float(np.mean([fact[key] for fact in facts]))
        report["splits"][split] = found
    return report


def _row(
    several: Sequence[Right], runs: Mapping[str, Sequence[Right]], groups: Mapping[str, str], places: Mapping[str, str]
) -> dict[str, Any]:
    """Mean over seeds: percent right, its interval, each clinic's, and the share of what pooling gains."""
    from model import metrics

    ids = sorted(groups)
    mean = mean_right(several, ids)
    whole = metrics.estimate(list(mean), [groups[i] for i in ids], _DRAWS)
    assert whole is not None
    own = {}
    for place in sorted(set(places.values())):
        own[place] = 100 * float(np.mean([value for value, i in zip(mean, ids, strict=True) if places[i] == place]))
    row: dict[str, Any] = {"seeds": len(several), "percent": whole.percent, "low": whole.low, "high": whole.high}
    row |= {"clinics": own}
    if runs["none"] and runs["pooled"]:
        start, best = mean_right(runs["none"], ids), mean_right(runs["pooled"], ids)
        row["gain"] = share(mean - start, best - start, [groups[i] for i in ids])
    return row


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
    tried = ", ".join(f"{rate:g}: {score:.1f} %" for rate, score in report["rates"].items())
    how = f"chosen on training images set aside ({tried})" if tried else "given"
    lines = [f"Learning rate {report['settings']['lr']:g}, {how}.", ""]
    for split, found in report["splits"].items():
        names = list(next(iter(found.values()))["clinics"]) if found else []
        lines += [f"SLAKE by {split}, {report['rows']} test questions:", ""]
        lines.append(
            f"| adapter | seeds | right %, 95 % interval | {' | '.join(names)} | gain | of pooling's | KiB up |"
        )
        lines.append("|---" * (6 + len(names)) + "|")
        for what, row in found.items():
            gain = row.get("gain") or {}
            gained = f"{gain['points']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]" if gain else ""
            part = f"{100 * gain['share']:.0f} %" if gain.get("share") is not None and what != "none" else ""
            sent = f"{row['bytes_up'] / 1024:.0f}" if "bytes_up" in row else ""
            own = " | ".join(f"{row['clinics'][name]:.1f}" for name in names)
            whole = f"{row['percent']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"
            lines.append(f"| {what} | {row['seeds']} | {whole} | {own} | {gained} | {part} | {sent} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
