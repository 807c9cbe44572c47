"""`afya-model`: ask a model about an image, evaluate it on a dataset, list what is on this machine.

Only click is imported here; each command imports what it needs when it runs, so `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from model import canary_cli, import_cli, measure_cli, plan_cli, quantize_cli
from model.commands import Commands

NOTICE = "Decision support, not a diagnosis."
_FILE = click.Path(path_type=Path)
_BITS = click.Choice(["32", "16", "8", "4"])


def plainly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the named failures of `model` into one sentence and exit code 1; anything else stays a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from model.adapters import AdapterRejected
        from model.backends import RequestRefused
        from model.data import DataError
        from model.evaluate import EvaluationError
        from model.images import ImageRejected
        from model.llava import ModelError
        from model.metrics import ScoreError
        from model.presets import PresetMissing

        refusals = (AdapterRejected, RequestRefused, DataError, EvaluationError, ImageRejected, ModelError)
        try:
            command(*args, **kwargs)
        except (*refusals, ScoreError, PresetMissing, measure_cli.MeasurementError) as error:
            raise click.ClickException(str(error)) from error

    return wrapped


def base(model: Path | None) -> Path:
    """The model folder asked for, or the reference model that comes with Afya."""
    from model import presets

    return model if model is not None else presets.reference_path()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="afya")
def main() -> None:
    """Ask, evaluate and list quantized medical vision-language models. Nothing leaves this machine."""


@main.command()
@click.argument("image", type=_FILE)
@click.argument("question")
@click.option("--bits", type=_BITS, help="Bits per weight [default: 4, or those of a quantized folder].")
@click.option("--model", type=_FILE, help="Model folder [default: the reference model].")
@click.option("--adapter", type=_FILE, help="LoRA adapter folder to put beside the model.")
@click.option("--device", help="cpu, cuda or cuda:N [default: cuda where there is one].")
@click.option("--frame", type=int, help="Frame of a multi-frame image [default: the middle one].")
@click.option("--max-new-tokens", type=click.IntRange(1, 1024), default=64, show_default=True)
@click.option("--reliance/--no-reliance", default=True, help="Ask once more with the picture hidden [default: yes].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@plainly
def ask(
    image: Path,
    question: str,
    bits: str | None,
    model: Path | None,
    adapter: Path | None,
    device: str | None,
    frame: int | None,
    max_new_tokens: int,
    reliance: bool,
    as_json: bool,
) -> None:
    """Ask QUESTION about IMAGE (PNG, JPEG, TIFF, WebP or DICOM) and say how the answer came about."""
    from model import images

    folder = base(model)
    picture = images.read(image, frame=frame)  # a bad image is refused before the model is loaded
    from model.backend_choice import bits_of, open_backend
    from model.backends import Answer, Request, Token

    backend = open_backend(folder, bits_of(folder, int(bits) if bits else None), adapter, device)
    answer: Answer | None = None
    request = Request(picture.rgb, question, max_new_tokens=max_new_tokens, reliance=reliance)
    for item in backend.generate([request]):
        if isinstance(item, tuple):
            answer = item[1]
        elif isinstance(item, Token) and not as_json:
            click.echo(item.text, nl=False)
            sys.stdout.flush()
    assert answer is not None  # one request always ends with one answer
    if as_json:
        facts = {**dataclasses.asdict(answer), "tokens_per_second": speed(answer), "static_bytes": backend.static_bytes}
        picture_facts = {"format": picture.format, "frames": picture.frames, "frame": picture.frame}
        click.echo(json.dumps({"question": question, **facts, "image": picture_facts, "notice": NOTICE}))
        return
    click.echo("" if answer.text else "(the model gave no text)")
    click.echo(f"\n{describe(answer, backend.static_bytes)}\n{NOTICE}")


def speed(answer: Any) -> float | None:
    """Tokens per second after the first one; None for an answer of a single token."""
    spent = answer.seconds - answer.first_token_seconds
    return round((answer.tokens - 1) / spent, 2) if answer.tokens > 1 and spent > 0 else None


def describe(answer: Any, static_bytes: int) -> str:
    """The facts about an answer as lines of text."""
    rate = speed(answer)
    adapter = answer.adapter_sha256[:12] if answer.adapter_sha256 else "none"
    cut = " (cut off at the token limit)" if answer.finish_reason == "length" else ""
    lines = [
        f"model        {answer.model_id} {answer.base_sha256[:12]}, {answer.bits} bits, adapter {adapter}",
        f"backend      {answer.backend}: {answer.reason}",
        f"first token  {answer.first_token_seconds:.3f} s",
        f"speed        {f'{rate:.1f} tokens/s' if rate else 'one token only'}, {answer.tokens} tokens{cut}",
        f"memory       {static_bytes / 2**20:.1f} MiB weights, {answer.peak_bytes / 2**20:.0f} MiB peak",
        f"confidence   {answer.confidence:.3f} (the model's own probability of exactly this answer)",
    ]
    if answer.reliance is not None:
        change = f"{answer.reliance_nats:+.2f} nats with the picture against none"
        lines.append(f"picture      {answer.reliance}: {change}, asked in {answer.reliance_seconds:.3f} s more")
    return "\n".join(lines)


@main.command()
@click.option("--model", type=_FILE, help="Model folder [default: the reference model].")
@click.option(
    "--data", "dataset", type=_FILE, required=True, help="SLAKE, VQA-RAD or LLaVA JSON, or a training folder."
)
@click.option("--images", type=_FILE, help="Folder of the images [default: found beside the data].")
@click.option("--bits", type=_BITS, help="Bits per weight [default: 4, or those of a quantized folder].")
@click.option("--adapter", type=_FILE, help="LoRA adapter folder to put beside the model.")
@click.option(
    "--out", type=_FILE, required=True, help="Folder for answers.jsonl and report.json; resumed if it has some."
)
@click.option("--batch", type=click.IntRange(1, 4096), default=32, show_default=True, help="Rows answered together.")
@click.option("--limit", type=click.IntRange(1), help="Only the first rows.")
@click.option("--max-new-tokens", type=click.IntRange(1, 1024), default=64, show_default=True)
@click.option("--device", help="cpu, cuda or cuda:N [default: cuda where there is one].")
@click.option("--compare", type=_FILE, help="answers.jsonl of another run: report the flips from it to this one.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, without a progress bar.")
@plainly
def evaluate(dataset: Path, bits: str | None, model: Path | None, as_json: bool, **options: Any) -> None:
    """Answer a dataset and score the answers strictly, with 95 % intervals over images."""
    folder = base(model)
    from model.backend_choice import bits_of
    from model.evaluate import REPORT, Settings, run

    wanted = bits_of(folder, int(bits) if bits else None)
    settings = Settings(model=folder, data=dataset, bits=wanted, progress=not as_json, **options)
    report = run(settings)
    if as_json:
        click.echo(json.dumps(report))
        return
    click.echo(table(report))
    click.echo(f"\nWritten to {settings.out / REPORT}.")


def table(report: dict[str, Any]) -> str:
    """The report as lines of text for a person."""
    scores, measured = report["scores"], report["measured"]
    lines = []
    for name in ("all", "closed", "open", "unknown", "open_recall", "open_f1"):
        if part := scores[name]:
            lines.append(f"{name.replace('_', ' '):<12} {_estimate(part)}")
    lines += [f"  {name:<20} {_estimate(part)}" for name, part in scores["by_topic"].items()]
    misfits = ("missing", "conflicting", "duplicates", "unmatched", "empty_references")
    odd = [f"{scores[name]} {name.replace('_', ' ')}" for name in misfits if scores[name]]
    lines += [f"rows that do not fit: {', '.join(odd)}"] if odd else []
    if flips := report.get("flips"):
        lines.append(
            f"flips        {flips['lost']} lost, {flips['gained']} gained of {flips['rows']} "
            f"({flips['difference']:+.2f} points), {flips['changed']} answers changed"
        )
    this = measured["this_run"]
    torn = ", a torn last line was dropped" if this["torn_lines_dropped"] else ""
    lines.append(f"{this['rows']} rows answered in {this['seconds']:.1f} s{torn}; {measured['reason']}")
    return "\n".join(lines)


def _estimate(part: dict[str, Any]) -> str:
    span = "" if part["low"] is None else f"  [{part['low']:.1f}, {part['high']:.1f}]"
    return f"{part['percent']:6.2f} %{span}  of {part['rows']}"


@main.command()
@click.argument("answers", type=_FILE, nargs=-1, required=True)
@click.option("--data", "dataset", type=_FILE, required=True, help="The dataset that was answered.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plainly
def score(answers: tuple[Path, ...], dataset: Path, as_json: bool) -> None:
    """Score ANSWERS (answers.jsonl of any program) strictly; of several runs, or seeds, also the mean."""
    from model.evaluate import score_files

    found = score_files(dataset, answers)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, scores in found["runs"].items():
        click.echo(f"{name}: {scores['missing']} of {scores['rows']} not answered")
        _lines(scores)
    if len(answers) > 1:
        click.echo(f"mean of {len(answers)} runs, interval over images")
        _lines(found["mean"])


def _lines(scores: dict[str, Any]) -> None:
    for kind in ("all", "closed", "open"):
        if part := scores[kind]:
            click.echo(f"  {kind:<8} {_estimate(part)}")


@main.command()
@measure_cli.options
@plainly
def memory(
    model: Path | None, dataset: Path | None, out: Path, as_json: bool, bits: str, backend: str, **given: Any
) -> None:
    """Measure memory and speed at several precisions, each in a process of its own."""
    texts = {name: "" if given[name] is None else str(given[name]) for name in ("images", "adapter", "device")}
    rest = {name: given[name] for name in ("limit", "max_new_tokens")}
    where = {"model": str(base(model)), "data": "" if dataset is None else str(dataset)}
    todo = measure_cli.plans(bits, backend, out, **where, **texts, **rest)
    report = measure_cli.run_all(todo, out, progress=not as_json)
    click.echo(json.dumps(report) if as_json else f"{measure_cli.table(report['results'])}\n\nWritten to {out}.")


for command in (
    import_cli.import_,
    import_cli.fetch,
    import_cli.list_,
    quantize_cli.quantize,
    canary_cli.canary,
    plan_cli.plan,
):
    main.add_command(command)


if __name__ == "__main__":
    main()
