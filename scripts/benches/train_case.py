"""One case of the training bench in a process of its own: prints a JSON line with speed, memory and losses.

`original` is what TinyLLaVA-Med's scripts run: ZeRO-3 with their settings, activations recomputed, logits at every
position, PyTorch's AdamW. `ours` is `server.stage`'s own pieces. Both see the same batches at the same learning rate.
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

LR = 2e-5


@click.command()
@click.option("--case", type=click.Choice(["original", "ours"]), required=True)
@click.option("--model", type=click.Path(path_type=Path), required=True)
@click.option("--batches", type=click.Path(path_type=Path), required=True)
@click.option("--trainable", default="all")
@click.option("--steps", default=20)
@click.option("--batch", default=0, help="Rows of a step [default: all of a batch].")
@click.option("--least-memory", is_flag=True, help="ZeRO-3, recomputation and everything offloaded that can be.")
def main(case: str, model: Path, batches: Path, trainable: str, steps: int, batch: int, least_memory: bool) -> None:
    """Run one case."""
    import torch

    from scripts.benches import train_batches
    from server.train import processes

    device, _, _ = processes()
    torch.manual_seed(0)
    read = train_batches.read(batches)
    rows = batch or len(read[0]["ids"])
    read = [{name: part[:rows] for name, part in one.items()} for one in read]
    run = _original(model, trainable, rows, device) if case == "original" else None
    run = run or _ours(model, trainable, rows, device, read, least_memory)
    losses, seconds = [], []
    for number in range(steps):
        given = {name: part.to(device) for name, part in read[number % len(read)].items()}
        torch.cuda.synchronize()
        began = time.perf_counter()
        losses.append(float(run["step"](given)))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    steady = sorted(seconds[min(5, steps - 1) :])
    facts = {"case": case, "trainable": trainable, "batch": rows, "engine": run["engine"], "losses": losses}
    facts |= {"seconds_per_step": steady[len(steady) // 2], "samples_per_second": rows / steady[len(steady) // 2]}
    facts |= {"first_step_seconds": seconds[0], "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    click.echo("RESULT " + json.dumps(facts))


def _pixels(pictures: Any, processor: Any, dtype: Any) -> Any:
    from server.train_data import normalise

    return normalise(pictures.float() / 255, processor).to(dtype)


def _original(folder: Path, trainable: str, rows: int, device: Any) -> dict[str, Any]:
    """The model under the original's recipe."""
    import deepspeed
    import torch

    from server import stage_model
    from server.stage_recipe import StageConfig

    model, processor = stage_model.open_model(folder, "bfloat16")
    model, _ = stage_model.choose_trainable(model, StageConfig(trainable=trainable))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    width = model.config.text_config.hidden_size
    zero = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 10**9}
    zero |= {"reduce_bucket_size": width**2, "stage3_prefetch_bucket_size": int(0.9 * width**2)}
    zero |= {"stage3_param_persistence_threshold": 10 * width}
    zero |= {"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
    }
    config |= {"bf16": {"enabled": True}, "zero_optimization": zero, "steps_per_print": 10**9}
    config |= {"zero_allow_untested_optimizer": True}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    engine, _, _, _ = deepspeed.initialize(model=model.to(device).train(), optimizer=optimizer, config=config)

    def step(batch: dict[str, Any]) -> Any:
        given = {"input_ids": batch["ids"], "labels": batch["labels"]}
        given["attention_mask"] = torch.ones_like(batch["ids"])
        given["pixel_values"] = _pixels(batch["pictures"], processor, torch.bfloat16)
        loss = engine(**given, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        return loss

    return {"step": step, "engine": "ZeRO 3, recomputing activations, logits everywhere, AdamW"}


def _ours(folder: Path, trainable: str, rows: int, device: Any, read: list[Any], least: bool) -> dict[str, Any]:
    """The model under `server.stage`, with the engine it chooses for this device."""
    import deepspeed
    import torch

    from server import stage, stage_engine, stage_model
    from server.stage_objective import StageObjective
    from server.stage_recipe import StageRecipe, from_dict

    fixed: dict[str, Any] = {"stage": {"trainable": trainable}, "optim": {"batch": rows, "accumulation": 1, "lr": LR}}
    if least:
        fixed["engine"] = {"zero_stage": 3, "recompute": True, "offload": True, "compile": False}
    recipe: StageRecipe = from_dict(fixed, "bench")
    model, processor = stage_model.open_model(folder, "bfloat16")
    model, found = stage_model.choose_trainable(model, recipe.stage)
    trained, total = (sum(pair[side] for pair in found.values()) for side in (0, 1))
    core = model.get_base_model() if hasattr(model, "peft_config") else model
    shape = stage_engine.shape_of(core, total, trained, bool(found["tower"][0]), read[0]["ids"].shape[1])
    choice = stage_engine.choose(recipe, shape, torch.cuda.mem_get_info(device)[0], 1, recipe.engine.compile)
    optimizer = stage.optimizer_of(model, recipe, device, choice.offload)
    objective = StageObjective(stage.prepared(model, choice, recipe.engine.compile))
    engine, _, _, _ = deepspeed.initialize(
        model=objective if choice.zero_stage == 3 or choice.offload else objective.to(device),
        optimizer=optimizer,
        config=stage_engine.deepspeed_config(recipe, choice),
    )

    image_id, layers = core.config.image_token_index, recipe.engine.compile and choice.zero_stage < 3
    step = partial(_our_step, engine, processor, image_id)
    return {"step": step, "engine": f"{choice.reason} Compiled layers: {layers}."}


def _our_step(engine: Any, processor: Any, image_id: int, batch: dict[str, Any]) -> Any:
    import torch

    ids, labels = batch["ids"], batch["labels"]
    row, column = (labels != -100).nonzero(as_tuple=True)
    given = {"input_ids": ids, "places": row * ids.shape[1] + column - 1, "targets": labels[row, column]}
    given["picture_places"] = (ids == image_id).flatten().nonzero().flatten()
    given["pixel_values"] = _pixels(batch["pictures"], processor, torch.float32)
    loss = engine(given)
    engine.backward(loss)
    engine.step()
    return loss


if __name__ == "__main__":
    main()
