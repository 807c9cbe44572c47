"""`afya-server train`: reads the recipe, starts the processes, trains. Heavy imports come after the checks."""

import os
import subprocess
import sys
from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command()
@click.option("--recipe", required=True, type=PATH, help="Recipe, for example server/recipes/reference.toml.")
@click.option("--data", required=True, type=PATH, help="Folder that holds the recipe's datasets.")
@click.option("--out", required=True, type=PATH, help="Folder for checkpoints, log, plot and weights.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a recipe value, e.g. optim.epochs=10."
)
@click.option(
    "--teacher", "teachers", multiple=True, type=PATH, help="Trained model whose soft answers are learnt too."
)
@click.option("--processes", default=1, show_default=True, help="Processes on this machine (GPUs, or CPU processes).")
@click.option("--model", "start", type=click.Path(path_type=Path), help="Trained model to go on from (else random).")
@click.option("--minutes", type=float, help="Stop after so long at the end of an epoch; --resume goes on.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out.")
def train(
    recipe: Path,
    data: Path,
    out: Path,
    overrides: tuple[str, ...],
    teachers: tuple[Path, ...],
    processes: int,
    start: Path | None,
    minutes: float | None,
    resume: bool,
) -> None:
    """Train a model with DeepSpeed, on a GPU or on CPU processes."""
    if processes > 1 and "LOCAL_RANK" not in os.environ:
        sys.exit(_launch(processes))
    from model.data import DataError
    from server import recipe as recipes

    try:
        loaded = recipes.load(recipe, overrides)
        _check_out(out, resume)
        _quiet()
        from server.train import train as run

        folder = run(loaded, data, out, resume=resume, start=start, teachers=teachers, minutes=minutes)
    except (recipes.RecipeError, DataError) as error:
        raise click.ClickException(str(error)) from error
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"Trained model written to {folder}; loss plot and log beside it.")


def _check_out(out: Path, resume: bool) -> None:
    if (out / "log.jsonl").exists() and not resume and os.environ.get("RANK", "0") == "0":
        raise click.ClickException(f"{out} already holds a run; add --resume to go on with it or choose another --out.")


def _quiet() -> None:
    """No hub, no telemetry; on a machine without a GPU DeepSpeed is told so instead of guessing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _launch(processes: int) -> int:
    """Start the same command once per process through PyTorch's launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    given = sys.argv[sys.argv.index("train") + 1 :] if "train" in sys.argv else sys.argv[1:]
    command += ["-m", "server.train_cli", *given]
    return subprocess.call(command, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})


if __name__ == "__main__":
    train()
