"""Training on the 4-bit base: the loss falls, only the asked-for factor moves, sharing a picture changes nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from client import batches, courtesy, trainer
from model import adapters, phantoms
from model.data import Sample


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return phantoms.make(6, ["plain"], seed=1, size=48)


@pytest.mark.parametrize(("factors", "targets"), [(("B",), "decoder"), (("A",), "decoder+projector+tower")])
def test_the_loss_falls_at_4_bits_and_the_frozen_factor_is_bit_identical(
    tiny: Path, samples: list[Sample], factors: Sequence[str], targets: str
) -> None:
    start = adapters.initial(tiny, 4, 8.0, targets, 0)
    if "A" in factors:  # with B at zero A has no gradient at all
        draw = np.random.default_rng(0)
        start = {n: a if a.any() else draw.normal(0, 0.05, a.shape).astype(np.float32) for n, a in start.items()}
    before = {name: array.copy() for name, array in start.items()}
    seen: list[int] = []
    done = trainer.train(
        samples, tiny, start, factors, 25, lr=1e-2, alpha=8.0, progress=lambda step, steps, loss: seen.append(step)
    )
    assert done.loss_after < done.loss_before - 0.2
    assert done.steps == 25 == len(done.losses) and seen == list(range(1, 26))
    for name, array in done.state.items():
        assert array.dtype == np.float32 and np.isfinite(array).all()
        assert np.array_equal(before[name], start[name])
        if adapters.factor(name) in factors:
            assert not np.array_equal(array, before[name]), name
        else:
            assert np.array_equal(array, before[name]), name


def test_the_same_seed_gives_the_same_adapter(tiny: Path, samples: list[Sample]) -> None:
    start = adapters.initial(tiny, 2, 8.0, "decoder", 0)
    one, two, other = (trainer.train(samples, tiny, start, steps=8, seed=seed, batch=4).state for seed in (3, 3, 4))
    assert all(np.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert any(not np.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_the_factors_b_learn_at_a_multiple_of_the_rate(tiny: Path, samples: list[Sample]) -> None:
    start = adapters.initial(tiny, 2, 8.0, "decoder", 0)

    def first_step(ratio: float) -> dict[str, float]:
        done = trainer.train(samples, tiny, start, steps=1, lr=1e-3, lr_ratio=ratio, alpha=8.0, bits=32).state
        return {f: max(float(np.abs(done[n] - start[n]).max()) for n in start if adapters.factor(n) == f) for f in "AB"}

    assert first_step(1)["B"] == pytest.approx(1e-3, rel=0.01), "Adam's first step has the length of the rate"
    assert first_step(8)["B"] == pytest.approx(8e-3, rel=0.01)


def test_what_is_prepared_once_trains_as_if_it_were_new(tiny: Path, samples: list[Sample]) -> None:
    start = adapters.initial(tiny, 2, 8.0, "decoder+projector", 0)
    how = {"batch": 4, "alpha": 8.0, "bits": 32}
    ready = trainer.prepare(samples, tiny, start, trainer.Options(**how))
    for factors, seed in (("B", 3), ("A", 4)):
        new = trainer.train(samples, tiny, start, factors, 4, seed=seed, **how)
        again = trainer.train(samples, tiny, start, factors, 4, seed=seed, prepared=ready, **how)
        assert again.losses == pytest.approx(new.losses, abs=1e-6)
        assert all(np.allclose(new.state[name], again.state[name], atol=1e-6) for name in start)


def test_questions_that_share_a_picture_have_the_loss_they_have_alone(tiny: Path, samples: list[Sample]) -> None:
    """Reference: transformers' own forward of each question alone, with pixels, at 32 bits."""
    import torch

    from model.collate import collate

    start = adapters.initial(tiny, 2, 8.0, "decoder", 0)
    model, loaded = trainer._attach(tiny, 32, start, 8.0)
    trainer._fill(model, start, ("B",))
    modules = [adapters.module(name) for name in start]
    shared = batches.Batches(samples, model, loaded, modules, 4, 0)
    groups = list(shared._groups(shared.generator))
    assert sorted(row for group in groups for row in group) == list(range(len(samples)))
    assert max(map(len, groups)) == batches.PACK
    total, count = 0.0, 0
    for group in groups[:3]:
        for row in group:
            alone = collate([samples[row]], loaded.processor, shared.prefix - 1)
            labels = int((alone["labels"] != -100).sum())
            with torch.no_grad():
                total += float(loaded.model(**alone).loss) * labels
            count += labels
    with torch.no_grad():
        assert float(shared.loss(groups[:3])) == pytest.approx(total / count, abs=1e-4)


def test_features_computed_once_are_those_of_every_step(tiny: Path, samples: list[Sample]) -> None:
    import torch

    losses = []
    for targets in ("decoder", "decoder+projector", "decoder+projector+tower"):
        start = adapters.initial(tiny, 2, 8.0, targets, 0)
        model, loaded = trainer._attach(tiny, 32, start, 8.0)
        trainer._fill(model, start, ("B",))
        made = batches.Batches(samples, model, loaded, [adapters.module(name) for name in start], 4, 0)
        with torch.no_grad():
            losses.append(float(made.loss(made.next_groups())))
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_an_adapter_for_other_layers_is_refused(tiny: Path, samples: list[Sample]) -> None:
    start = adapters.initial(tiny, 2, 8.0, "decoder", 0)
    name = min(start)
    wide = {**start, name: np.zeros((2, 7), np.float32)}
    with pytest.raises(adapters.AdapterRejected, match="has shape"):
        trainer.train(samples, tiny, wide, steps=1)


def test_no_samples_and_a_rate_that_explodes_are_said(tiny: Path, samples: list[Sample]) -> None:
    start = adapters.initial(tiny, 2, 8.0, "decoder", 0)
    with pytest.raises(trainer.TrainingFailed, match="no samples"):
        trainer.train([], tiny, start)
    with pytest.raises(trainer.TrainingFailed, match="smaller learning rate"):
        trainer.train(samples, tiny, start, ("B",), 10, lr=1e30)


def test_a_library_that_would_ignore_the_pictures_is_refused() -> None:
    class Old:
        def forward(self, input_ids: object = None, pixel_values: object = None, **rest: object) -> None: ...

    with pytest.raises(trainer.TrainingFailed, match="without looking at the pictures"):
        trainer._sees_features(Old())


def test_training_stops_when_its_time_is_over(tiny: Path, samples: list[Sample]) -> None:
    start = adapters.initial(tiny, 2, 8.0, "decoder", 0)
    with pytest.raises(courtesy.TimeOver, match="before the pictures"):
        trainer.train(samples, tiny, start, steps=50, seconds=0.0)
    ready = trainer.prepare(samples, tiny, start, trainer.Options())
    done = trainer.train(samples, tiny, start, steps=50, seconds=0.0, prepared=ready)
    assert done.steps == 1 and 0 < done.cases <= len(samples)
    waiting = courtesy.Courtesy(tiny)
    waiting.over = True  # the kiosk was being answered when the time was over, and still is
    done = trainer.train(samples, tiny, start, steps=1, prepared=ready, courtesy=waiting)
    assert done.loss_after == done.losses[-1]


def test_the_patients_of_an_update_are_those_of_its_batches(tiny: Path, samples: list[Sample]) -> None:
    start = adapters.initial(tiny, 2, 8.0, "decoder", 0)
    ready = trainer.prepare(samples, tiny, start, trainer.Options(batch=1))
    patients = len({sample.group for sample in samples})
    assert trainer.train(samples, tiny, start, steps=1, batch=1, prepared=ready).cases == 1
    assert trainer.train(samples, tiny, start, steps=4 * patients, batch=1, prepared=ready).cases == patients
