"""`afya-server train`: reads the recipe, starts the processes, trains. Heavy imports come after the checks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


@click.command()
@click.option("--recipe", required=True, type=PATH, help="Recipe, for example server/recipes/downstream.toml.")
@click.option("--data", required=True, type=PATH, help="Conversations (LLaVA JSON); for reference.toml their folder.")
@click.option("--images", type=PATH, help="Folder of the pictures that the conversations name.")
@click.option("--model", "start", type=PATH, help="Model folder to start from: imported, or the stage's before.")
@click.option("--out", required=True, type=PATH, help="Folder for checkpoints, log, plot and weights.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a recipe value, e.g. optim.epochs=10."
)
@click.option(
    "--teacher", "teachers", multiple=True, type=PATH, help="Trained model whose soft answers are learnt too."
)
@click.option("--processes", default=1, show_default=True, help="Processes on this machine (GPUs, or CPU processes).")
@click.option("--hostfile", type=PATH, help="Hosts for DeepSpeed's launcher, a line each: NAME slots=GPUS.")
@click.option("--minutes", type=float, help="Stop after so long at the end of an epoch (reference.toml only).")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out.")
def train(
    recipe: Path, start: Path | None, out: Path, processes: int, hostfile: Path | None, resume: bool, **rest: Any
) -> None:
    """Train a model with DeepSpeed, on one or many GPUs and hosts, or on CPU processes.

    \b
    The three stages of a published model, each from the last:
      afya-server train --recipe server/recipes/alignment.toml --model TINYLLAVA \\
        --data alignment_500k.json --images IMAGES --out runs/alignment
      afya-server train --recipe server/recipes/instruction.toml --model runs/alignment/model ...
      afya-server train --recipe server/recipes/downstream.toml --model runs/instruction/model ...
    """
    from server import recipe as recipes

    try:
        stage = recipes.has_stage(recipe)
        if stage and start is None:
            raise click.UsageError("A stage starts from a model; give its folder with --model.")
        if (processes > 1 or hostfile) and "LOCAL_RANK" not in os.environ:
            sys.exit(_launch(processes, hostfile))
        _check_out(out, resume)
        _quiet()
        run = _stage if stage else _reference
        folder = run(recipe=recipe, start=start, out=out, resume=resume, **rest)
    except _refusals() as error:
        raise click.ClickException(str(error)) from error
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"Trained model written to {folder}; loss plot and log beside it.")


def _stage(
    recipe: Path, start: Any, data: Path, images: Path | None, out: Path, overrides: tuple[str, ...], resume: bool,
    **others: Any,
) -> Path:  # fmt: skip
    """One of the three stages of a published model."""
    from server import stage_recipe

    loaded = stage_recipe.load(recipe, overrides)
    if others["teachers"] or others["minutes"] is not None:
        raise click.UsageError("--teacher and --minutes go with reference.toml, not with a stage.")
    from server.stage import train as run

    return run(loaded, start, data, images or data.parent, out, resume)


def _reference(
    recipe: Path, start: Path | None, data: Path, out: Path, overrides: tuple[str, ...], resume: bool, **others: Any
) -> Path:
    """A small model from random weights (or going on from `start`)."""
    from server import recipe as recipes

    loaded = recipes.load(recipe, overrides)
    from server.train import train as run

    return run(loaded, data, out, resume=resume, start=start, teachers=others["teachers"], minutes=others["minutes"])


def _refusals() -> tuple[type[Exception], ...]:
    from model.data import DataError
    from model.llava import ModelError
    from model.prompts import TemplateUnknown
    from server.recipe import RecipeError
    from server.stage_log import StageStopped

    return (DataError, ModelError, TemplateUnknown, RecipeError, StageStopped)


def _check_out(out: Path, resume: bool) -> None:
    if (out / "log.jsonl").exists() and not resume and os.environ.get("RANK", "0") == "0":
        raise click.ClickException(f"{out} already holds a run; add --resume to go on with it or choose another --out.")


def _quiet() -> None:
    """No hub, no telemetry; on a machine without a GPU DeepSpeed is told so instead of guessing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _launch(processes: int, hostfile: Path | None) -> int:
    """Start the same command once per process: PyTorch's launcher on this host, DeepSpeed's on those of a hostfile."""
    _quiet()
    given = sys.argv[sys.argv.index("train") + 1 :] if "train" in sys.argv else sys.argv[1:]
    if hostfile:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", *_hosts(hostfile), "--no_local_rank", "--module"]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command.append("-m")
    command += ["server.train_cli", *given]
    return subprocess.call(command, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})


def _hosts(hostfile: Path) -> list[str]:
    """Options of DeepSpeed's launcher for a hostfile; this host alone needs no ssh."""
    try:
        names = [line.split()[0] for line in hostfile.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise click.ClickException(
            f"{hostfile} cannot be read ({error.strerror}); a hostfile has a line `NAME slots=GPUS` for each host."
        ) from error
    from server.outputs import free_port

    alone = ["--no_ssh_check", "--master_addr", "127.0.0.1"] if names == ["localhost"] else []
    return ["--hostfile", str(hostfile), "--master_port", str(free_port()), *alone]


if __name__ == "__main__":
    train()
