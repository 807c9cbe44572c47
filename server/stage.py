"""Training of a published or imported model on LLaVA conversations with DeepSpeed: one stage of three.

Run through `afya-server train` with a recipe that has a [stage]. On one device or many, one host or many. A run that
was killed goes on with --resume as if nothing had happened: data order, dropout and optimizer depend on seed and step.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.conversations import read_conversations
from model.prompts import template_of
from server import stage_engine, stage_model, stage_preflight
from server.outputs import warmup_cosine
from server.stage_batches import Rows, check_rows, epoch_steps, loader
from server.stage_checkpoint import Checkpoints
from server.stage_log import Log, watch
from server.stage_objective import StageObjective
from server.stage_recipe import StageRecipe
from server.train_data import normalise

_SAMPLED = 256  # rows whose true length is measured for the memory estimate


@dataclass
class Run:
    """Everything one process needs while it trains a stage."""

    recipe: StageRecipe
    start: Path
    out: Path
    device: Any
    rank: int
    world: int
    engine: Any
    processor: Any
    rows: Rows
    record: dict[str, Any]
    total: int  # optimizer steps of the whole run
    step: int = 0


def train(recipe: StageRecipe, start: Path, data: Path, images: Path, out: Path, resume: bool = False) -> Path:
    """Train the model in `start` on the conversations in `data`; returns the folder `out/model`.

    Raises StageStopped, DataError or ModelError with one plain sentence; a stopped run keeps its checkpoints.
    """
    from server.train import processes

    torch.manual_seed(recipe.optim.seed)
    device, rank, world = processes()
    run = _start(recipe, start, data, images, out, device, rank, world)
    checkpoints = Checkpoints(out / "checkpoints", recipe.checkpoint.keep, rank)
    run.step = checkpoints.load(run.engine, recipe.stage.trainable) if resume else 0
    if rank == 0:
        text = json.dumps(run.record, indent=1)
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(text + "\n", encoding="utf-8")
    log = Log(out, recipe.log, rank, run.record, run.step)
    try:
        _steps(run, checkpoints, log)
    finally:
        log.close()
    return _finish(run)


def _start(
    recipe: StageRecipe, start: Path, data: Path, images: Path, out: Path, device: Any, rank: int, world: int
) -> Run:
    import deepspeed

    conversations, report = read_conversations(data, images)
    say = _say if rank == 0 else _silent
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    empty, processor = stage_model.open_empty(start)
    tokens = int(empty.config.image_seq_length)
    check_rows(conversations, data, tokens, recipe.stage.max_length)
    rows = Rows(conversations, processor, template_of(start), tokens, recipe.stage.max_length)
    empty, found = stage_model.choose_trainable(empty, recipe.stage)
    trained, total = (sum(pair[side] for pair in found.values()) for side in (0, 1))
    shape = stage_engine.shape_of(empty, total, trained, bool(found["tower"][0]), _usual_tokens(rows))
    compiled = recipe.engine.compile and device.type == "cuda"
    choice = stage_engine.choose(recipe, shape, memory, world, compiled)
    for line in stage_preflight.inspect(recipe, conversations, report, shape, choice, memory, out, start, world):
        say(line)
    say(stage_model.describe(found, recipe.stage.trainable))
    dtype = "bfloat16" if recipe.engine.precision == "bf16" else "float32"
    model, _ = stage_model.choose_trainable(stage_model.open_model(start, dtype)[0], recipe.stage)
    steps = recipe.optim.epochs * len(epoch_steps(rows.lengths(), *_shares(recipe, world), recipe.optim.seed, 0))
    optimizer = optimizer_of(model, recipe, device, choice.offload)
    model = prepared(model, choice, compiled)
    engine, _, _, _ = deepspeed.initialize(
        model=StageObjective(model) if choice.zero_stage == 3 or choice.offload else StageObjective(model).to(device),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(recipe, steps)),
        config=stage_engine.deepspeed_config(recipe, choice),
    )
    record = {"recipe": recipe.as_dict(), "start": start.name, "data": data.name, "rows": report.kept}
    record |= {"trainable": found, "engine": choice.__dict__, "processes": world, "steps": steps}
    return Run(recipe, start, out, device, rank, world, engine, processor, rows, record, steps)


def _shares(recipe: StageRecipe, world: int) -> tuple[int, int]:
    """Rows of a micro-batch and how many micro-batches a step has over all processes."""
    return recipe.optim.batch, world * recipe.optim.accumulation


def _usual_tokens(rows: Rows) -> int:
    """Tokens of the longest of some rows, evenly picked, after the cut."""
    step = max(1, len(rows) // _SAMPLED)
    return min(rows.longest, max(len(rows.tokens(number)[0]) for number in range(0, len(rows), step)))


def prepared(model: Any, choice: stage_engine.Choice, compiled: bool) -> Any:
    """The model in training mode, recomputing and compiled as chosen; ZeRO 3 gathers weights layer by layer: eager."""
    from server.objective import compile_layers

    core = model.get_base_model() if hasattr(model, "peft_config") else model
    if choice.recompute:
        core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not any(p.requires_grad for p in core.get_input_embeddings().parameters()):
            core.enable_input_require_grads()
    if compiled and choice.zero_stage < 3:
        compile_layers(core)
    return model.train()


def optimizer_of(model: Any, recipe: StageRecipe, device: Any, offload: bool) -> Any:
    """AdamW over what is trained; norms and biases are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas, fused = (recipe.optim.beta1, recipe.optim.beta2), device.type == "cuda" and not offload
    return torch.optim.AdamW(groups, lr=recipe.optim.lr, betas=betas, eps=recipe.optim.eps, fused=fused)


def _schedule(recipe: StageRecipe, steps: int) -> Any:
    return warmup_cosine(steps, recipe.optim.warmup, recipe.optim.min_lr / recipe.optim.lr)


def _steps(run: Run, checkpoints: Checkpoints, log: Log) -> None:
    """All steps that are left; a checkpoint every so many, and one before an ordered stop."""
    recipe, lengths = run.recipe, run.rows.lengths()
    bar = tqdm(
        total=run.total, initial=run.step, desc=recipe.stage.name, unit="step", disable=run.rank != 0, mininterval=1.0
    )
    each = run.total // recipe.optim.epochs
    for epoch in range(run.step // each, recipe.optim.epochs):
        plan = epoch_steps(lengths, *_shares(recipe, run.world), recipe.optim.seed, epoch)[run.step - epoch * each :]
        batches = _batches(run, [part for step in plan for part in step[run.rank :: run.world]])
        for _ in plan:
            began = time.perf_counter()
            loss = _step(run, batches)
            seconds = time.perf_counter() - began
            rate = recipe.optim.batch * recipe.optim.accumulation * run.world / seconds
            row = {"step": run.step, "epoch": epoch + 1, "loss": loss, "lr": run.engine.get_lr()[0]}
            log.step(row | {"grad_norm": _norm(run.engine), "samples_per_second": round(rate, 2)})
            bar.update(1)
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", samples_s=f"{rate:.1f}", refresh=False)
            if run.step % recipe.checkpoint.steps == 0 and run.step < run.total:
                checkpoints.save(run.engine, run.step)
            watch(log.losses, replace(recipe.watch, after=recipe.watch.after if run.rank == 0 else 0))
    bar.close()


def _batches(run: Run, batches: list[list[int]]) -> Any:
    settings = {
        "image_token": run.engine.module.model.config.image_token_id,
        "pad_id": run.processor.tokenizer.pad_token_id or 0,
        "multiple": run.recipe.engine.length_multiple,
        "side": stage_model.image_side(run.processor),
    }
    return loader(run.rows, batches, settings, run.recipe.engine.workers)


def _step(run: Run, batches: Any) -> float:
    """One optimizer step; returns the mean loss of its micro-batches over all processes."""
    torch.manual_seed((run.recipe.optim.seed * 1_000_003 + run.step) * 64 + run.rank)
    losses = []
    for _ in range(run.recipe.optim.accumulation):
        batch = {name: part.to(run.device, non_blocking=True) for name, part in next(batches).items()}
        batch["pixel_values"] = normalise(batch["pixel_values"].float() / 255, run.processor)
        loss = run.engine(batch)
        run.engine.backward(loss)
        run.engine.step()
        losses.append(loss.detach())
    run.step += 1
    mean = torch.stack(losses).mean() / run.world
    if run.world > 1:
        torch.distributed.all_reduce(mean)
    return float(mean)


def _norm(engine: Any) -> float:
    """Norm of the last gradient before clipping, 0 where DeepSpeed does not say."""
    norm = engine.get_global_grad_norm()
    return round(float(norm), 6) if norm is not None else 0.0


def _finish(run: Run) -> Path:
    """Write the weights (and the adapter of a LoRA stage); every process takes part in gathering them."""
    state = stage_model.gathered(run.engine, lambda name: True, run.rank)
    if run.rank == 0:
        model = run.engine.module.model
        if run.recipe.stage.trainable == "lora":
            stage_model.save_adapter(state, run.recipe.stage.lora_alpha, run.start, run.out / "adapter")
            model, state = stage_model.merged(model, state)
        stage_model.write(model, state, run.processor, run.start, run.out, run.record)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return run.out / "model"


def _say(line: str) -> None:
    tqdm.write(line)


def _silent(_: str) -> None:
    pass


def peak_gib() -> float:
    """Largest memory of this process's device so far, GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / stage_engine.GIB if torch.cuda.is_available() else 0.0
