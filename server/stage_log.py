"""What a stage writes while it trains: log.jsonl, TensorBoard, Weights & Biases if asked for, the plot, and its watch.

log.jsonl is the record the others are drawn from; a resumed run forgets the rows of steps that it does again.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server import outputs
from server.stage_recipe import LogConfig, WatchConfig


class StageStopped(RuntimeError):
    """A run that had better not go on; the message says why and what to do."""


class Log:
    """The logs of one run on the process that writes them; on others every call does nothing."""

    def __init__(self, out: Path, config: LogConfig, rank: int, record: dict[str, Any], first: int) -> None:
        """`record` is the run's configuration; rows from step `first` on are forgotten. Raises StageStopped."""
        self.out, self.active = out, rank == 0
        self.losses: list[float] = []
        self.board: Any = None
        self.wandb: Any = None
        if not self.active:
            return
        out.mkdir(parents=True, exist_ok=True)
        if first and (out / "log.jsonl").exists():
            outputs.drop_after(out, first)
            self.losses = [row["loss"] for row in outputs.read_log(out)]
        else:
            (out / "log.jsonl").write_text("", encoding="utf-8")
        if config.tensorboard:
            self.board = _tensorboard(out / "tensorboard", first)
        if config.wandb:
            self.wandb = _wandb(config, out, record)

    def step(self, row: dict[str, float | int]) -> None:
        """One optimizer step: step, epoch, loss, lr, grad_norm, samples_per_second."""
        if not self.active:
            return
        self.losses.append(float(row["loss"]))
        outputs.log(self.out, row)
        values = {name: value for name, value in row.items() if name != "step"}
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(f"train/{name}", value, row["step"])
        if self.wandb:
            self.wandb.log(values, step=row["step"])

    def close(self) -> None:
        """Draw loss.png and close the logs."""
        if not self.active:
            return
        if self.losses:
            plot(self.out)
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def watch(losses: Sequence[float], config: WatchConfig) -> None:
    """Raise StageStopped when the loss is no number, or has not fallen where it should have.

    Every `config.after` steps the mean of the last `window` losses must lie `fall` (relative) below that of the first
    `window`; once it has, a later plateau is fine.
    """
    if losses and losses[-1] != losses[-1]:
        raise StageStopped(f"The loss is no number at step {len(losses)}; lower optim.lr or use engine.precision fp32.")
    if not config.after or len(losses) != config.after:
        return
    window = min(config.window, max(1, len(losses) // 2))
    first, last = sum(losses[:window]) / window, sum(losses[-window:]) / window
    if last > first * (1 - config.fall):
        raise StageStopped(
            f"The loss does not fall: mean {first:.4f} over the first {window} steps, {last:.4f} over the last. Check "
            "the data (afya-server data check), the learning rate and what is trained; watch.after=0 goes on anyway."
        )


def plot(out: Path) -> None:
    """Draw loss.png: the loss of every step and its running mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = outputs.read_log(out)
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    mean, smooth = losses[0], []
    for loss in losses:
        mean = 0.95 * mean + 0.05 * loss
        smooth.append(mean)
    figure, axis = pyplot.subplots(figsize=(7, 4), dpi=110)
    axis.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axis.plot(steps, smooth, color="C0", label="running mean")
    axis.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axis.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(out / "loss.png")
    pyplot.close(figure)


def _tensorboard(folder: Path, first: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first + 1 if first else None)


def _wandb(config: LogConfig, out: Path, record: dict[str, Any]) -> Any:
    try:
        wandb: Any = importlib.import_module("wandb")  # optional: only for those who ask for it
    except ImportError as error:
        raise StageStopped(
            "Weights & Biases is not installed; run `pip install 'afya[wandb]'` or set log.wandb=false."
        ) from error
    return wandb.init(project=config.project, dir=str(out), config=record, resume="allow", id=out.resolve().name)
