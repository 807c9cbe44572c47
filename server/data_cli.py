"""`afya-server data`: build train and test files, download the published ones, check any before training."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
_CORES = os.cpu_count() or 1


@click.group()
def data() -> None:
    """Build, download and check training data in LLaVA format."""


def _guard(call: Callable[[], Any]) -> Any:
    """Run `call`; a known kind of failure becomes one plain sentence and exit code 1."""
    from model.llava import ModelError
    from model.prompts import TemplateUnknown
    from model.rows import DataError
    from server.data_fetch import DiskFull

    try:
        return call()
    except (DataError, DiskFull, ModelError, TemplateUnknown) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'A file'}: {error.strerror or error}.") from error


@data.command()
@click.option("--slake", type=PATH, help="SLAKE: folder with train.json, validate.json, test.json and imgs/.")
@click.option("--vqa-rad", type=PATH, help="VQA-RAD: its JSON file, or the folder with it and its pictures.")
@click.option("--path-vqa", type=PATH, help="PathVQA: folder of Parquet, JSON or CSV files (no pickles).")
@click.option("--images", required=True, type=PATH, help="Folder above all pictures; image names are relative to it.")
@click.option("--out", required=True, type=PATH, help="Folder for the files.")
@click.option(
    "--language",
    type=click.Choice(["en", "zh", "both"]),
    default="en",
    show_default=True,
    help="Rows of SLAKE to take.",
)
@click.option(
    "--split-by-image", type=float, metavar="FRACTION", help="Own split: this part of the pictures is for test."
)
@click.option("--seed", default=0, show_default=True, help="Of --split-by-image.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def build(
    slake: Path | None,
    vqa_rad: Path | None,
    path_vqa: Path | None,
    images: Path,
    out: Path,
    language: str,
    split_by_image: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Make train and test files from official VQA-RAD, SLAKE and PathVQA, and train_all.json of all together.

    \b
    The official split:  afya-server data build --slake data/slake --vqa-rad data/vqa_rad --images data --out vqa
    By picture instead:  afya-server data build --slake data/slake --images data --out vqa --split-by-image 0.2
    """
    from server.data_build import Plan
    from server.data_build import build as make

    plan = Plan(images, slake, vqa_rad, path_vqa, language, split_by_image, seed)
    built = _guard(lambda: make(plan, out))
    if as_json:
        click.echo((out / "build.json").read_text())
        return
    for name, counts in built.files.items():
        click.echo(f"{name}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    for what, count in built.left_out.items():
        click.echo(f"left out, {what}: {count}")
    for name, count in built.shared_images.items():
        if count:
            click.echo(f"{name}: {count} pictures are in train and in test; --split-by-image makes a split without.")


@data.command()
@click.option("--out", type=PATH, default=Path("llava-med"), show_default=True, help="Folder to fill.")
@click.option(
    "--file", "names", multiple=True, metavar="NAME", help="A published file, or all; --list shows them. Repeat it."
)
@click.option(
    "--images-of", type=PATH, metavar="LIST", help="Fetch the pictures of a list (llava_med_image_urls.jsonl)."
)
@click.option(
    "--only-for", type=PATH, metavar="FILE", help="Of these, only the pictures that a conversation file names."
)
@click.option("--jobs", type=click.IntRange(1, 64), default=4, show_default=True, help="Downloads at once.")
@click.option("--base-url", metavar="URL", help="Mirror of the published files.")
@click.option("--tar-base", default="", metavar="URL", help="Mirror of the article archives: replaces scheme and host.")
@click.option("--tries", type=click.IntRange(1), default=5, show_default=True, help="Attempts without progress.")
@click.option("--keep-free", type=float, default=2.0, show_default=True, metavar="GIB", help="Leave so much disk free.")
@click.option("--any-size", is_flag=True, help="Take a published file although its size is not the known one.")
@click.option("--list", "show", is_flag=True, help="List the published files and end.")
def download(show: bool, **given: Any) -> None:
    """Fetch LLaVA-Med's files and pictures; run it again to go on after a cut or to try missing ones again.

    \b
    afya-server data download --file instruct-60k-inline --file image-list
    afya-server data download --images-of llava-med/llava_med_image_urls.jsonl \\
        --only-for llava-med/instruct/llava_med_instruct_60k_inline_mention.json --jobs 8

    Pictures go to OUT/images; what became of each file is a line of download-report.jsonl.
    """
    from server import data_download

    if show:
        for item in data_download.PUBLISHED:
            click.echo(f"{item.name:20} {f'{item.mib:8.2f} MiB' if item.mib else '    size not known'}  {item.path}")
        return
    if not given["names"] and not given["images_of"]:
        raise click.UsageError("Nothing to fetch: give --file NAME (see --list) or --images-of LIST.")
    summary = _guard(lambda: _download(given))
    for outcome in summary.examples:
        click.echo(f"{outcome.state}: {outcome.name}: {outcome.reason}", err=True)
    click.echo(", ".join(f"{count} {state}" for state, count in summary.counts.items()) or "Nothing to do.")
    if summary.stopped:
        raise click.ClickException(summary.stopped)
    if set(summary.counts) - {"done", "kept"}:
        raise click.ClickException("Not everything came; the report says what is missing and why.")


def _download(given: dict[str, Any]) -> Any:
    """Make the jobs that the options ask for and run them with a bar."""
    import httpx
    from tqdm import tqdm

    from server import data_download, data_images, data_jobs
    from server.data_fetch import Fetcher

    out: Path = given["out"]
    place = out / "images" if given["images_of"] else out
    place.mkdir(parents=True, exist_ok=True)
    early: list[data_jobs.Outcome] = []
    jobs: list[data_jobs.Job] = []
    with httpx.Client(follow_redirects=True, timeout=60) as client:
        fetcher = Fetcher(client, given["tries"], keep_free=int(given["keep_free"] * 2**30))
        if given["names"]:
            wanted, base = _published(given["names"]), given["base_url"] or data_download.BASE_URL
            jobs += data_download.published_jobs(fetcher, out, wanted, base, given["any_size"])
        total = len(jobs)
        if given["images_of"]:
            only = _named(given["only_for"]) if given["only_for"] else None
            pictures, early = data_images.read_list(given["images_of"], only)
            more, kept = data_images.picture_jobs(fetcher, place, pictures, given["tar_base"])
            click.echo(f"{kept} pictures are here; the others are in {len(more)} archives.")
            jobs, total = jobs + more, total + len({p.pair_id for p in pictures}) - kept
        with tqdm(total=total, desc="download", unit="file", mininterval=0.5) as bar:
            return data_jobs.run_jobs(fetcher, jobs, place, given["jobs"], lambda _: bar.update(), early)


def _published(names: Iterable[str]) -> list[Any]:
    """The files of the release by their short names. Raises UsageError."""
    from server.data_download import PUBLISHED

    known = {item.name: item for item in PUBLISHED}
    unknown = [name for name in names if name not in known and name != "all"]
    if unknown:
        raise click.UsageError(f"There is no published file {unknown[0]!r}; --list shows them.")
    return list(PUBLISHED) if "all" in names else [known[name] for name in dict.fromkeys(names)]


def _named(path: Path) -> set[str]:
    """Pair ids of the pictures that a conversation file refers to. Raises DataError."""
    from model.conversations import read_conversations

    return {Path(row.image).stem for row in read_conversations(path)[0] if row.image}


@data.command()
@click.argument("files", nargs=-1, required=True, type=PATH)
@click.option("--images", required=True, type=PATH, help="Folder of the pictures.")
@click.option("--test", "tests", multiple=True, type=PATH, help="Test file that must share no picture. Repeat it.")
@click.option("--model", type=PATH, help="Model folder; then rows longer than --max-length are found, too.")
@click.option("--max-length", default=2048, show_default=True, help="Tokens that training keeps of a row.")
@click.option("--processes", default=_CORES, show_default="all cores", help="Processes that open pictures.")
@click.option("--strict", is_flag=True, help="Exit 1 for warnings, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def check(
    files: tuple[Path, ...],
    images: Path,
    tests: tuple[Path, ...],
    model: Path | None,
    max_length: int,
    processes: int,
    strict: bool,
    as_json: bool,
) -> None:
    """Find what would break or waste a training run: bad rows, pictures, lengths, duplicates, overlap with test.

    \b
    afya-server data check vqa/train_all.json --images data --test vqa/slake_test.json --model models/tinyllava

    Exit code 1 if anything would break training.
    """
    from tqdm import tqdm

    from server import data_check

    def bar(items: Iterable[Any], count: int, what: str) -> Iterable[Any]:
        return tqdm(items, total=count, desc=what, mininterval=0.5, leave=False)

    def run() -> data_check.CheckReport:
        length = data_check.lengths(model, max_length) if model else None
        return data_check.check(
            files, images, test=tests, length=length, max_length=max_length, workers=processes, progress=bar
        )

    report = _guard(run)
    click.echo(json.dumps(report.as_dict(), indent=1, ensure_ascii=False) if as_json else report.table())
    if report.errors or (strict and report.faults):
        raise click.exceptions.Exit(1)
