"""The pieces of a stage: order of batches, tensors, the loss against the library's own, the choice by memory."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.stage_batches import Row, epoch_steps, tensors
from server.stage_engine import GIB, Choice, Shape, choose, deepspeed_config, estimate
from server.stage_log import StageStopped, watch
from server.stage_recipe import StageRecipe, WatchConfig, from_dict
from server.stage_recipe import load as load_recipe

ROOT = Path(__file__).parents[2]
TRUE_SIZE = Shape(1_504_353_824, 1_504_353_824, 2048, 5632, 22, 1152, 4304, 26, 729, True, 32001, 857)


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 1003)
    epochs = [epoch_steps(lengths, 4, 6, seed=1, epoch=epoch) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    rows = [row for step in epochs[0] for part in step for row in part]
    assert len(rows) == 42 * 24 and set(rows) == set(range(1003))
    assert all(len(step) == 6 and all(len(part) == 4 for part in step) for step in epochs[0])


def test_rows_of_a_batch_are_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 4096)
    spread = [np.ptp(lengths[part]) for step in epoch_steps(lengths, 8, 2, 0, 0) for part in step]
    assert np.median(spread) < 20


def test_fewer_rows_than_a_step_needs_are_repeated() -> None:
    steps = epoch_steps(np.array([5, 6, 7]), 4, 2, 0, 0)
    assert len(steps) == 1 and {row for part in steps[0] for row in part} == {0, 1, 2}


def test_the_loss_is_the_librarys_own(tiny: Path) -> None:
    import torch

    from server.stage_model import open_model
    from server.stage_objective import StageObjective
    from server.train_data import normalise

    model, processor = open_model(tiny, "float32")
    image, tokens = model.config.image_token_id, model.config.image_seq_length
    generator = np.random.default_rng(0)
    made = []
    for number, text in enumerate((5, 9, 3)):
        picture = None if number == 1 else generator.integers(0, 256, (3, 32, 32), dtype=np.uint8)
        ids = [1, *([image] * tokens if picture is not None else []), *generator.integers(10, 300, text).tolist()]
        made.append(Row(ids, [-100] * (len(ids) - 2) + ids[-2:], picture))
    batch = tensors(made, image, 0, 8, 32)
    batch["pixel_values"] = normalise(batch["pixel_values"].float() / 255, processor)
    ours = StageObjective(model)(batch)
    labels = torch.full_like(batch["input_ids"], -100)
    flat = labels.flatten()
    flat[batch["places"] + 1] = batch["targets"]
    mask = torch.zeros_like(labels)
    for line, row in enumerate(made):
        mask[line, : len(row.ids)] = 1
    theirs = model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        labels=flat.view_as(labels),
        pixel_values=batch["pixel_values"],
    ).loss
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    ours.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in found:
            assert torch.allclose(found[name], parameter.grad, atol=1e-6), name


def test_a_batch_without_pictures_still_runs_the_tower(tiny: Path) -> None:
    from server.stage_model import open_model
    from server.stage_objective import StageObjective

    model, _ = open_model(tiny, "float32")
    batch = tensors([Row([1, 20, 30], [-100, 20, 30], None)], model.config.image_token_id, 0, 1, 32)
    assert batch["pixel_values"].shape == (1, 3, 32, 32) and len(batch["picture_places"]) == 0
    batch["pixel_values"] = batch["pixel_values"].float() / 255
    StageObjective(model)(batch).backward()
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())


def test_a_batch_without_labels_teaches_nothing(tiny: Path) -> None:
    from server.stage_model import open_model
    from server.stage_objective import StageObjective

    model, _ = open_model(tiny, "float32")
    batch = tensors([Row([1, 20, 30], [-100] * 3, None)], model.config.image_token_id, 0, 1, 32)
    batch["pixel_values"] = batch["pixel_values"].float() / 255
    loss = StageObjective(model)(batch)
    loss.backward()
    assert float(loss.detach()) == 0.0


def recipe(**optim: Any) -> StageRecipe:
    return from_dict({"stage": {"trainable": "all"}, "optim": optim}, "test")


def test_the_choice_follows_the_memory() -> None:
    def chosen(gib: float, world: int = 1) -> Choice:
        return choose(recipe(), TRUE_SIZE, int(gib * GIB), world, compiled=True)

    assert (chosen(139).zero_stage, chosen(139).recompute) == (1, False)
    assert chosen(48).recompute and chosen(48).bytes <= 48 * GIB
    assert chosen(24, world=8).zero_stage == 1 and chosen(20, world=8).zero_stage == 2
    assert "more than the 10.0 GiB" in chosen(10).reason
    assert choose(recipe(), TRUE_SIZE, None, 1, compiled=False).zero_stage == 1


def test_what_the_recipe_fixes_stays() -> None:
    fixed = from_dict({"engine": {"zero_stage": 3, "recompute": False, "offload": True}}, "test")
    found = choose(fixed, TRUE_SIZE, GIB, 1, compiled=False)
    assert (found.zero_stage, found.recompute, found.offload) == (3, False, True)
    config = deepspeed_config(fixed, found)
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_the_estimate_grows_with_batch_and_shrinks_with_devices() -> None:
    one = estimate(TRUE_SIZE, 2, True, False, 8, 1, compiled=False)
    assert estimate(TRUE_SIZE, 2, True, False, 16, 1, compiled=False) > one
    assert estimate(TRUE_SIZE, 2, True, False, 8, 8, compiled=False) < one
    frozen = dataclasses.replace(TRUE_SIZE, trained=6_557_696, tower_trained=False)
    assert estimate(frozen, 2, True, False, 8, 1, compiled=False) < one


@pytest.mark.parametrize("name", ["alignment", "instruction", "downstream"])
def test_the_recipes_carry_the_originals_hyperparameters(name: str) -> None:
    found = load_recipe(ROOT / f"server/recipes/{name}.toml")
    optim, epochs = found.optim, {"alignment": 1, "instruction": 10, "downstream": 18}
    assert (optim.epochs, optim.batch, optim.accumulation, optim.lr) == (epochs[name], 32, 2, 2e-5)
    assert (optim.warmup, optim.weight_decay, optim.clip, optim.seed) == (0.03, 0.0, 1.0, 42)
    assert found.stage.max_length == 2048 and found.engine.precision == "bf16"


def test_the_watch_stops_a_loss_that_is_no_number_and_lets_a_plateau_be() -> None:
    config = WatchConfig(after=10, window=3, fall=0.01)
    with pytest.raises(StageStopped, match="no number at step 2"):
        watch([1.0, float("nan")], config)
    watch([5.0] * 9, config)
    watch([5.0, 5.0, 5.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0], config)
    watch([5.0] * 11, config)
    with pytest.raises(StageStopped, match="does not fall"):
        watch([5.0] * 10, config)
