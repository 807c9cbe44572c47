"""Central training of a small model from random weights with DeepSpeed, on one GPU or on CPU processes.

Run through `afya-server train`. Resumes exactly: data order and augmentation depend on seed, epoch and step alone.
Not here: the three stages of the published checkpoints, ZeRO-3, several hosts.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model import build
from model.data import DataError, Sample, read
from model.packing import grouped
from server import outputs, pseudo
from server.augment import augment
from server.ema import Ema
from server.objective import Objective, add_drop_path, compile_layers, exact_answers, soft_answers
from server.recipe import Recipe
from server.train_data import Bank, build_bank, epoch_batches, gather, normalise, steps


@dataclass
class Run:
    """Everything one process needs while it trains."""

    recipe: Recipe
    out: Path
    device: Any
    rank: int
    world: int
    engine: Any
    model: Any
    processor: Any
    bank: Bank
    held_out: Bank | None
    ema: Ema
    teachers: list[Any]
    teacher_names: list[str]
    total: int  # optimiser steps of the whole run
    step: int = 0


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    start: Path | None = None,
    teachers: tuple[Path, ...] = (),
    minutes: float | None = None,
) -> Path:
    """Train and write `out/model` (weights, processor, configuration); returns that folder.

    `start` is a trained model to go on from; without it the weights are random and the tokenizer is made from the data.
    After `minutes` the run stops at the end of an epoch: the weights so far are written, and resuming goes on.
    """
    began = time.monotonic()
    run = _start(recipe, data, out, start, teachers)
    first = _resume(run) if resume else 0
    if run.rank == 0 and not first:
        outputs.begin(out, recipe, run.bank.samples, run.model)
    bar = tqdm(total=run.total, initial=run.step, desc="train", unit="step", disable=run.rank != 0, mininterval=1.0)
    for epoch in range(first, recipe.optim.epochs):
        _epoch(run, epoch, bar)
        last = epoch + 1 == recipe.optim.epochs
        every = recipe.optim.validate_epochs
        if run.held_out and (last or (every and (epoch + 1) % every == 0)):
            _validate(run, epoch)
        late = minutes is not None and time.monotonic() - began > 60 * minutes
        if not last and (late or (epoch + 1) % recipe.optim.checkpoint_epochs == 0):
            _checkpoint(run, epoch + 1)
        if late and not last:
            tqdm.write(f"Stopped after {minutes:g} minutes at epoch {epoch + 1}; go on with --resume.")
            break
    bar.close()
    return _finish(run)


def _start(recipe: Recipe, data: Path, out: Path, start: Path | None, teachers: tuple[Path, ...]) -> Run:
    import deepspeed

    device, rank, world = processes()
    samples = gather(recipe.data, data)
    model, processor = _model(recipe, samples, start, teachers)
    loaded = [_teacher(path, device) for path in teachers]
    tokens = model.config.image_seq_length
    bank = build_bank(samples, processor, tokens, device)
    if loaded and recipe.data.pseudo_rows:
        pseudo.add(bank, loaded, processor, recipe.data.pseudo_rows, recipe.optim.seed)
    held_out = None
    if recipe.data.validate:
        rows = read(data / recipe.data.validate, data / recipe.data.validate_images)
        held_out = build_bank(rows, processor, tokens, device)
    add_drop_path(model, recipe.optim.drop_path)
    if recipe.engine.compile and device.type == "cuda":
        for network in (model, *loaded):
            compile_layers(network)
    objective = Objective(model, recipe.optim.label_smoothing, recipe.optim.distill, recipe.optim.temperature)
    total = sum(steps(bank, recipe.optim, recipe.data.phantom_parts))
    optimizer = _optimizer(model, recipe, device)
    engine, _, _, _ = deepspeed.initialize(
        model=objective.to(device),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, outputs.schedule(recipe, total)),
        config=outputs.deepspeed_config(recipe, world),
    )
    ema, names = Ema(model, recipe.optim.ema), [str(path) for path in teachers]
    return Run(recipe, out, device, rank, world, engine, model, processor, bank, held_out, ema, loaded, names, total)


def processes() -> tuple[Any, int, int]:
    """Join the process group; a single process needs no launcher."""
    import deepspeed

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(outputs.free_port()))
    gpu = torch.cuda.is_available()
    local = int(os.environ["LOCAL_RANK"])
    if gpu:
        torch.cuda.set_device(local)
        torch.backends.cuda.matmul.allow_tf32 = True
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", verbose=False)
    device = torch.device(f"cuda:{local}" if gpu else "cpu")
    return device, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _model(recipe: Recipe, samples: list[Sample], start: Path | None, teachers: tuple[Path, ...]) -> tuple[Any, Any]:
    """The model to train and its processor; with teachers it speaks their tokens, so that soft answers fit."""
    from transformers import AutoProcessor

    if start:
        return _teacher(start, "cpu").train(), AutoProcessor.from_pretrained(start)
    corpus = [text for sample in samples for text in (sample.question, sample.answer)]
    spoken = [AutoProcessor.from_pretrained(path).tokenizer for path in teachers]
    if any(tokenizer.get_vocab() != spoken[0].get_vocab() for tokenizer in spoken):
        raise DataError("The teachers' tokenizers differ; give teachers that were trained on the same texts.")
    return build.build(recipe.model, corpus, recipe.optim.seed, spoken[0] if spoken else None)


def _teacher(path: Path, device: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).to(device).eval()


def _optimizer(model: Any, recipe: Recipe, device: Any) -> Any:
    """AdamW; norms and biases are not decayed."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": recipe.optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.optim.lr, betas=(0.9, recipe.optim.beta2), fused=device.type == "cuda")


def _autocast(run: Run) -> Any:
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.recipe.engine.precision == "bf16")


def _epoch(run: Run, epoch: int, bar: Any) -> None:
    recipe = run.recipe
    run.engine.train()
    losses: list[Any] = []
    for groups in epoch_batches(run.bank, recipe.optim, recipe.data.phantom_parts, epoch, run.rank, run.world):
        batch = run.bank.batch(groups, recipe.engine.length_multiple)
        seed = (recipe.optim.seed * 1_000_003 + run.step) * 64 + run.rank
        torch.manual_seed(seed)
        generator = torch.Generator(run.device).manual_seed(seed)
        pictures = augment(batch.pop("pictures"), recipe.augment, generator)
        batch["pixel_values"] = normalise(pictures, run.processor)
        with _autocast(run):
            soft = soft_answers(run.teachers, batch, recipe.optim.temperature) if run.teachers else None
        loss = run.engine(batch, soft)
        run.engine.backward(loss)
        run.engine.step()
        run.step += 1
        run.ema.update(run.step)
        losses.append(loss.detach())
        bar.update(1)
    mean = float(torch.stack(losses).mean())
    bar.set_postfix(epoch=epoch + 1, loss=f"{mean:.3f}")
    if run.rank == 0:
        outputs.log(run.out, {"epoch": epoch + 1, "step": run.step, "loss": mean, "lr": run.engine.get_lr()[0]})


@torch.no_grad()
def _validate(run: Run, epoch: int) -> None:
    """Strict exact match of the averaged weights on the held-out rows, by type; logged, never trained on."""
    if run.rank or not run.held_out:
        return
    bank = run.held_out
    flags: dict[int, bool] = {}
    rows = grouped(range(len(bank.samples)), bank.image_of, run.recipe.optim.pack, np.random.default_rng(0))
    run.model.eval()
    with run.ema.applied(), _autocast(run), torch.compiler.set_stance("force_eager"):
        for start in range(0, len(rows), 32):
            groups = rows[start : start + 32]
            batch = bank.batch(groups)
            batch["pixel_values"] = normalise(batch.pop("pictures"), run.processor)
            for group, right in zip(groups, exact_answers(run.model, batch), strict=True):
                flags.update(zip(group, right, strict=True))
    scores = {"all": 100 * sum(flags.values()) / len(flags)}
    for kind in ("closed", "open"):
        chosen = [flags[row] for row, sample in enumerate(bank.samples) if sample.answer_type == kind]
        scores[kind] = 100 * sum(chosen) / max(len(chosen), 1)
    outputs.log(run.out, {"epoch": epoch + 1, "step": run.step, "validate": scores})
    tqdm.write(f"epoch {epoch + 1}: exact match " + ", ".join(f"{k} {v:.1f} %" for k, v in scores.items()))


def _checkpoint(run: Run, epoch: int) -> None:
    """DeepSpeed's state and the average; `latest` is DeepSpeed's own pointer, written last."""
    folder = run.out / "checkpoints"
    tag = f"epoch-{epoch:04d}"
    if run.rank == 0:
        (folder / tag).mkdir(parents=True, exist_ok=True)
        run.ema.save(folder / tag / "ema.safetensors")
    run.engine.save_checkpoint(str(folder), tag=tag, client_state={"epoch": epoch, "step": run.step})
    if run.rank == 0:
        outputs.prune(folder, keep=2)


def _resume(run: Run) -> int:
    """Load the last checkpoint; returns the number of finished epochs."""
    folder = run.out / "checkpoints"
    path, state = run.engine.load_checkpoint(str(folder)) if (folder / "latest").exists() else (None, None)
    if path is None or state is None:
        return 0
    run.step = int(state["step"])
    run.ema = Ema(run.model, run.recipe.optim.ema)
    run.ema.load(Path(path).parent / "ema.safetensors" if Path(path).is_file() else Path(path) / "ema.safetensors")
    if run.rank == 0:
        outputs.drop_after(run.out, run.step)
    return int(state["epoch"])


def _finish(run: Run) -> Path:
    folder = run.out / "model"
    if run.rank == 0:
        with run.ema.applied():
            outputs.save_weights(run.model, folder, run.recipe.engine.save_dtype)
        run.processor.save_pretrained(folder)
        record = run.recipe.as_dict() | {"teachers": run.teacher_names}
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        outputs.plot(run.out)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return folder
