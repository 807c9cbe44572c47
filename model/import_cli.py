"""`afya-model import`, `fetch` and `list`: bring published models to this machine and see what is there.

Only click is imported here; each command imports what it needs when it runs.
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

_FOLDER = click.Path(path_type=Path)
_GIB = 2**30


def _plainly(command: Callable[..., None]) -> Callable[..., None]:
    """Named failures become one sentence and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from model.adapters import AdapterRejected
        from model.checkpoint_source import CheckpointError
        from model.fetch import FetchError
        from model.presets import PresetMissing

        try:
            command(*args, **kwargs)
        except (AdapterRejected, CheckpointError, FetchError, PresetMissing) as error:
            raise click.ClickException(str(error)) from error

    return wrapped


@click.command("import")
@click.argument("src", type=_FOLDER)
@click.option("--out", type=_FOLDER, required=True, help="New folder for the model.")
@click.option("--tower", type=_FOLDER, help="Folder of the vision tower [default: what the checkpoint names].")
@click.option(
    "--tower-weights",
    type=click.Choice(["auto", "checkpoint", "tower"]),
    default="auto",
    show_default=True,
    help="Whose weights the vision tower gets; auto: the checkpoint's, if it holds them.",
)
@click.option("--base", type=_FOLDER, help="The model that a LoRA or projector folder was trained on.")
@click.option("--preset", help="A name of `afya-model list`: gives tower, template, source and licence.")
@click.option(
    "--template",
    type=click.Choice(["v1", "llava_v1", "plain", "mistral_instruct", "afya"]),
    help="Conversation template [default: that of the preset or of the kind of checkpoint].",
)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="[default: as it is stored]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and no progress.")
@_plainly
def import_(src: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Import the checkpoint in SRC (LLaVA, TinyLLaVA, LLaVA-Med; whole, LoRA or projector) as a model folder."""
    from model.checkpoints import import_checkpoint

    with _BytesBar("writing", as_json) as bar:
        report = import_checkpoint(src, out, progress=bar.at, **options)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
        return
    click.echo(f"{report.parameters:,} parameters, {report.bytes / _GIB:.2f} GiB as {report.dtype}")
    click.echo(
        f"template {report.template}; a picture is {report.image_tokens} tokens, <image> is {report.image_token_id}"
    )
    same = " (equal to the tower's folder)" if report.tower_different == 0 else ""
    click.echo(f"tower {report.tower}, weights of the {report.tower_weights}{same}")
    if report.merged:
        click.echo(f"{report.merged} LoRA layers merged")
    if report.dropped:
        click.echo(f"{len(report.dropped)} entries of no use left out, first {report.dropped[0]}")
    for note in report.notes:
        click.echo(f"Note: {note}.")
    click.echo(f"Written to {report.out} in {report.seconds:.1f} s.")


@click.command()
@click.argument("name")
@click.option("--out", type=_FOLDER, required=True, help="Folder for the files; a fetch that was cut goes on there.")
@click.option("--revision", help="Commit, or revision of the server's manifest [default: the preset's].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and no progress.")
@_plainly
def fetch(name: str, out: Path, revision: str | None, as_json: bool) -> None:
    """Fetch NAME (of `afya-model list`, a hub name, an https address with a manifest.json, or a folder)."""
    from model.fetch import fetch as bring

    with _BytesBar("", as_json) as bar:
        found = bring(name, out, revision, progress=bar.file)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found) | {"out": str(found.out)}))
        return
    size = f"{found.bytes / _GIB:.2f} GiB, {found.new_bytes / _GIB:.2f} GiB of them new"
    click.echo(f"{found.files} files, {size}; revision {found.revision}.\nIn {found.out}, next: afya-model import.")


class _BytesBar:
    """A progress bar in bytes on standard error, one line for each file; nothing where JSON is wanted."""

    def __init__(self, text: str, silent: bool) -> None:
        self._text, self._silent = text, silent
        self._bar: Any = None

    def __enter__(self) -> _BytesBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def at(self, done: int, total: int) -> None:
        """`done` of `total` bytes are there."""
        self.file(self._text, done, total)

    def file(self, name: str, done: int, total: int) -> None:
        """`done` of `total` bytes of a file are there."""
        if self._silent:
            return
        from tqdm import tqdm

        if self._bar is None or self._bar.desc != name:
            self.__exit__()
            self._bar = tqdm(desc=name, total=total, unit="B", unit_scale=True, file=sys.stderr, initial=0)
            self._bar.desc = name
        self._bar.update(done - self._bar.n)


def models() -> list[dict[str, Any]]:
    """The presets with their sizes: fields of `presets.Preset`, parameters, bytes at 16, 8 and 4 bits, `here`."""
    from model import presets

    found = []
    for known in presets.PRESETS:
        facts = dataclasses.asdict(known) | presets.size_facts(known)
        facts.pop("decoder")
        facts["here"] = presets.is_here(known)
        found.append(facts)
    return found


def on_this_machine(home: Path) -> list[dict[str, Any]]:
    """Imported models in `home`/models: folder name, template, source."""
    found = []
    for path in sorted((home / "models").glob("*/import.json")):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            facts = {}
        found.append({"name": path.parent.name, "template": facts.get("template"), "source": facts.get("source")})
    return found


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_plainly
def list_(as_json: bool) -> None:
    """List the known base models, and the models and adapters installed in $AFYA_HOME."""
    from model import adapters, files

    home = files.home()
    current = adapters.current(home)
    folders = sorted(p.parent.name for p in (home / "adapters").glob("*/adapter_config.json"))
    installed = [{"name": name, "current": current is not None and current.name == name} for name in folders]
    known, imported = models(), on_this_machine(home)
    if as_json:
        facts = {"models": known, "imported": imported, "adapters": installed, "home": str(home)}
        click.echo(json.dumps(facts))
        return
    click.echo(table(known))
    for row in imported:
        click.echo(f"{row['name']:<18} imported from {row['source']}, template {row['template']}")
    click.echo(f"\nAdapters in {home / 'adapters'}:" if installed else f"\nNo adapter is installed in {home}.")
    for row in installed:
        click.echo(f"{'*' if row['current'] else ' '} {row['name']}")


def table(known: list[dict[str, Any]]) -> str:
    """The presets as text: sizes are of the weights at 16, 8 and 4 bits, calculated, in GB (10^9 bytes)."""
    lines = [f"{'name':<18} {'parameters':>10} {'16 bit':>7} {'8 bit':>7} {'4 bit':>7}  about"]
    for row in known:
        sizes = [f"{size / 1e9:.2f}" if (size := row[f"bytes_{bits}"]) else "?" for bits in (16, 8, 4)]
        count = f"{row['parameters'] / 1e6:.0f} M" if row["parameters"] else "?"
        lines.append(f"{row['name']:<18} {count:>10} {sizes[0]:>7} {sizes[1]:>7} {sizes[2]:>7}  {row['about']}")
        if row["template"] == "afya":
            source = "comes with Afya" if row["here"] else "not in this copy of Afya"
        else:
            source = f"{row['source'] or 'no address known'}, revision {row['revision'] or 'not pinned yet'}"
        lines.append(f"{'':<18} {source}; licence: {row['licence'] or 'see the model card'}")
    return "\n".join([*lines, "Sizes in GB of the weights, calculated."])
