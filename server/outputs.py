"""What a training run writes or derives beside the weights: log, plot, configuration, schedule, DeepSpeed settings."""

import json
import math
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model.data import Sample
from server.recipe import Recipe


def begin(out: Path, recipe: Recipe, samples: Sequence[Sample], model: Any) -> None:
    """Write config.json (recipe, sizes, counts) and an empty log."""
    out.mkdir(parents=True, exist_ok=True)
    sources: dict[str, int] = {}
    for sample in samples:
        sources[sample.source] = sources.get(sample.source, 0) + 1
    counts = {
        "rows": sources,
        "images": len({sample.group for sample in samples}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    text = json.dumps({"recipe": recipe.as_dict(), "counts": counts}, indent=1)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")
    (out / "log.jsonl").write_text("", encoding="utf-8")


def save_weights(model: Any, folder: Path, dtype: str) -> None:
    """Write a copy of the weights in `dtype` as safetensors shards below 16 MB; the model stays as it is."""
    import copy

    import torch

    for layer in model.modules():  # compiled forwards are instance attributes and cannot be copied
        layer.__dict__.pop("forward", None)
    shipped = copy.deepcopy(model).to("cpu", getattr(torch, dtype))
    shipped.save_pretrained(folder, max_shard_size="15MB")


def log(out: Path, row: dict[str, Any]) -> None:
    """Append one line to log.jsonl."""
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_log(out: Path) -> list[dict[str, Any]]:
    """Rows of log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines() if line]


def drop_after(out: Path, step: int) -> None:
    """Forget log rows of steps that a resumed run will do again."""
    rows = [row for row in read_log(out) if row["step"] <= step]
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def plot(out: Path) -> None:
    """Draw loss.png from the log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_log(out)
    figure, axis = pyplot.subplots(figsize=(7, 4), dpi=110)
    trained = [row for row in rows if "loss" in row]
    axis.plot([row["epoch"] for row in trained], [row["loss"] for row in trained], label="training loss")
    axis.set(xlabel="epoch", ylabel="loss (nats a token)")
    judged = [row for row in rows if "validate" in row]
    if judged:
        right = axis.twinx()
        right.plot([r["epoch"] for r in judged], [r["validate"]["all"] for r in judged], "C1.-", label="exact match")
        right.set_ylabel("held-out exact match, %")
    axis.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(out / "loss.png")
    pyplot.close(figure)


def schedule(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """Factor on the learning rate of a recipe."""
    return warmup_cosine(steps, recipe.optim.warmup, recipe.optim.min_lr / recipe.optim.lr)


def warmup_cosine(steps: int, warmup: float, floor: float) -> Callable[[int], float]:
    """Factor on the learning rate: linear warm-up, then cosine down to `floor` (Loshchilov and Hutter 2017)."""
    warm = max(1, int(steps * warmup))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        part = min(1.0, (step - warm) / max(1, steps - warm))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part))

    return factor


def deepspeed_config(recipe: Recipe, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration: fp32 weights; with precision bf16 the engine's own autocast.

    An autocast around the engine's forward would be switched off inside it.
    """
    return {
        "train_micro_batch_size_per_gpu": recipe.optim.batch // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optim.clip,
        "zero_optimization": {"stage": recipe.engine.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": recipe.engine.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in sorted(folder.glob("epoch-*"))[:-keep]:
        shutil.rmtree(old)


def free_port() -> int:
    """A port that was free a moment ago, for the process group's rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
