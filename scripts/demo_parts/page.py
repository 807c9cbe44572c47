"""The demo's page: one self-contained HTML file that a coordinator understands and a first-time visitor enjoys.

Every figure comes from the report's own dictionary, every picture from this run. Not here: measuring (`measure`) and
drawing plots (`plots`). Real images (SLAKE) are shown with their source named; phantoms have no patient in them.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from model import data, images, metrics
from model.data import Sample
from model.files import write_atomic
from scripts.demo_parts import plots
from scripts.demo_parts.clinics import ClinicData

Answers = Mapping[str, Mapping[str, Any]]
SHOWN = 3  # pictures of each clinic
STYLE = (Path(__file__).with_name("page.css")).read_text(encoding="utf-8")


def write(path: Path, report: Mapping[str, Any], clinics: Sequence[ClinicData], answers: Mapping[str, Answers]) -> None:
    """Write the page to `path`, whole or not at all."""
    parts = [head(report), story(report), evidence(report), gallery(clinics, answers), dicom(report), cost(report)]
    parts += [limits(report), measured(report)]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Afya: three clinics, one model</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>"
    )
    write_atomic(path, page.encode())


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _p(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def head(report: Mapping[str, Any]) -> str:
    """The title and the three figures that matter."""
    found, gain = report["accuracy"], report["gain"]
    size = sum(report["bytes_per_round"]) / max(1, len(report["bytes_per_round"]))
    minutes = report["seconds"]["total"] / 60
    share = gain["share_of_pooled_gain"]
    cards = [
        (f"{found['reference']:.0f} % → {found['federated']:.0f} %", "right answers to sealed questions"),
        (f"{share:.0f} %" if share is not None else "–", "of what pooling all images gains"),
        (f"{size / 1e6:.1f} MB", f"moved in each of {report['rounds']} rounds; not one image"),
    ]
    boxes = "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cards)
    real = report["measured"]["settings"]["data"] is not None
    whose = (
        "Each clinic has another kind of picture, none of which it was trained on."
        if real
        else "Three clinics have scanners it has never seen."
    )
    return (
        "<header><h1>Three clinics, one model, no image shared</h1>"
        f"<p>A small vision-language model answers questions about medical pictures. {whose} Each trains a small"
        " adapter on its own computer, on cases its staff reviewed and consented to; only the adapters travel. This is"
        f" one real run, {minutes:.1f} minutes on this computer.</p>"
        f'<div class="cards">{boxes}</div></header>'
    )


def story(report: Mapping[str, Any]) -> str:
    """What happened, in four steps."""
    table = report["clinics"].values()
    cases, corrected = sum(c["cases"] for c in table), sum(c["corrected"] for c in table)
    asked, samples = sum(c["asked"] for c in table), sum(c["samples"] for c in table)
    updates = len(report["federation"]["losses"])
    refused, installed = len(report["rejected"]), len(report["federation"]["installed"])
    steps = {
        "Ask and review": f"The reference model answered {asked} questions about {cases} pictures at three kiosks."
        f" Staff corrected {corrected} wrong answers and confirmed the rest (here: from the known truth).",
        "Consent": f"The kiosks' consent gate let {samples} reviewed questions into the clinics' training folders."
        " There they stayed.",
        "Train together": f"{report['rounds']} rounds: {updates} updates were accepted, {refused} refused. The two LoRA"
        " factors took turns, so that their mean is exact.",
        "Install": f"The released adapter was installed at {installed} clinics, beside the 4-bit model, unmerged.",
    }
    items = "".join(f"<li><b>{escape(title)}</b>{_p(text)}</li>" for title, text in steps.items())
    notes = "".join(f"<li><b>{escape(n)}</b>: {escape(c['note'])}</li>" for n, c in report["clinics"].items())
    return _section("What happened", f'<ol class="steps">{items}</ol>', f"<ul>{notes}</ul>")


def evidence(report: Mapping[str, Any]) -> str:
    """Accuracy with intervals, by clinic, and the loss over the rounds."""
    scored, names = report["scores"], list(report["clinics"])
    order = ["reference", *(f"local {name}" for name in names), "federated", "pooled"]
    rows = [(n, *(scored[n]["all"][key] for key in ("percent", "low", "high"))) for n in order]
    by_clinic = {n: {c: scored[n]["by_clinic"][c]["percent"] for c in names} for n in order}
    change = report["difference"]
    words = (
        f"Federated against reference on the same {change['rows']} questions: {change['difference']:+.1f} points"
        f" (95 % interval {_signed(change['difference_low'])} to {_signed(change['difference_high'])});"
        f" {change['gained']} answers became right, {change['lost']} became wrong."
    )
    return _section(
        "Did it help?",
        _p("Every model answers the same sealed questions, about pictures nobody trained on, at 4 bits. Thin lines are"
           " 95 % intervals."),
        plots.bars(rows, "Right answers on the union of the sealed sets"),
        _p(words),
        "<h3>Clinic by clinic</h3>",
        plots.heat(order, names, by_clinic, "Right answers by adapter and clinic"),
        _p("A clinic's own adapter helps at home; the federated one is meant to help everywhere.", "soft"),
        "<h3>Round by round</h3>",
        plots.lines(*_losses(report, names), "Loss of each clinic's samples after its training, by round"),
        _p("Loss on a fixed handful of each clinic's own samples after its training of that round.", "soft"),
    )  # fmt: skip


def _signed(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.1f}"


def _losses(report: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, list[float]], list[str]]:
    rounds = range(1, report["rounds"] + 1)
    rows = report["federation"]["losses"]
    series = {
        name: [r["loss-after"] for number in rounds for r in rows if (r["round"], r["clinic"]) == (number, name)]
        for name in names
    }
    return series, [f"round {number}" for number in rounds]


def gallery(clinics: Sequence[ClinicData], answers: Mapping[str, Answers]) -> str:
    """A few sealed pictures of each clinic with a question and both answers: the first ones, not the best ones."""
    parts = []
    for clinic in clinics:
        first = list({sample.group: sample for sample in _spread(clinic.sealed)}.values())[:SHOWN]
        cards = "".join(_picture(sample, answers) for sample in first)
        parts.append(f'<h3>{escape(clinic.name)}</h3><div class="pictures">{cards}</div>')
    return _section(
        "See for yourself",
        _p("The first sealed pictures of each clinic with one question each, not the most flattering ones."),
        *parts,
    )


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, reversed, so that of each picture the first question stays and pictures keep their order."""
    groups = list(dict.fromkeys(sample.group for sample in samples))
    first = {sample.group: sample for sample in reversed(samples)}
    return [first[group] for group in groups]


def _picture(sample: Sample, answers: Mapping[str, Answers]) -> str:
    png = base64.b64encode(images.to_png(data.load_rgb(sample))).decode()
    lines = [f'<img alt="{escape(sample.group)}" src="data:image/png;base64,{png}">']
    lines += [f"<b>{escape(sample.question)}</b>", f"<span>truth: {escape(sample.answer)}</span>"]
    for name in ("reference", "federated"):
        text = str(answers[name][sample.id]["text"])
        right = metrics.exact(text, sample.answer)
        mark, kind = ("✓", "right") if right else ("✗", "wrong")
        lines.append(f'<span class="{kind}">{mark} {name}: {escape(text) or "(nothing)"}</span>')
    return f"<figure>{''.join(lines)}</figure>"


def dicom(report: Mapping[str, Any]) -> str:
    """The questions about pydicom's CT and MR."""
    rows = "".join(
        f"<tr><td>{escape(a['picture'])}</td><td>{escape(a['question'])}</td><td>{escape(a['reference']['answer'])}</td>"
        f"<td>{escape(a['federated']['answer'])}</td></tr>"
        for a in report["answers"]
    )
    table = f"<table><tr><th>file</th><th>question</th><th>reference</th><th>federated</th></tr>{rows}</table>"
    after = _p(
        "Neither file is of the kind the adapter was trained on. Where a right answer turned wrong, the model has"
        " forgotten something while it learnt: a clinic should check an adapter on its own pictures before using it.",
        "soft",
    )
    return _section(
        "Two real DICOM files", _p("pydicom's own test pictures, a CT and an MR, read as DICOM."), table, after
    )


def cost(report: Mapping[str, Any]) -> str:
    """Time, bytes and memory."""
    seconds = "".join(f"<tr><td>{escape(n)}</td><td>{s:.0f} s</td></tr>" for n, s in report["seconds"].items())
    memory = "".join(f"<tr><td>{escape(n)}</td><td>{m:.0f} MiB</td></tr>" for n, m in report["peak_memory_mib"].items())
    per = "".join(
        f"<tr><td>round {n}</td><td>{b / 1e6:.2f} MB</td><td>{s:.0f} s</td></tr>"
        for n, (b, s) in enumerate(
            zip(report["bytes_per_round"], report["federation"]["round_seconds"], strict=True), 1
        )
    )
    return _section(
        "What it cost",
        f'<div class="columns"><table><tr><th>stage</th><th>time</th></tr>{seconds}</table>'
        f"<table><tr><th>round</th><th>moved</th><th>time</th></tr>{per}</table></div>",
        f"<details><summary>Peak memory of every process</summary><table>{memory}</table></details>",
    )


def limits(report: Mapping[str, Any]) -> str:
    """What this run does not show."""
    items = "".join(f"<li>{escape(line)}</li>" for line in [*report["remarks"], *report["limits"]])
    refused = report["rejected"]
    lines = "".join(f"<li>round {r['round']}, {escape(r['clinic'])}: {escape(r['reason'])}</li>" for r in refused)
    shown = f"<p>Refused updates:</p><ul>{lines}</ul>" if refused else _p("No update was refused in this run.")
    return _section("What this does not show", f"<ul>{items}</ul>", shown)


def measured(report: Mapping[str, Any]) -> str:
    """How it was measured, for whoever wants to repeat it."""
    details = json.dumps({"sha256": report["sha256"], **report["measured"]}, indent=1)
    return _section(
        "How it was measured",
        _p(report["measured"]["accuracy"] + "."),
        f"<details><summary>Seeds, settings, versions, hashes</summary><pre>{escape(details)}</pre></details>",
        _p("All figures: report.json beside this page."),
    )
