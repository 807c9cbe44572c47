"""Memory that runs out halves the parts and changes nothing else; the proximal term pulls back; caps are kept."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import memory, steps, trainer
from client.batches import Batches
from model import adapters, phantoms
from model.data import Sample
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return phantoms.make(6, ["plain"], seed=1, size=48)


@pytest.fixture
def start(tiny: Path) -> adapters.State:
    return adapters.initial(tiny, 2, 8.0, "decoder", 0)


def short(monkeypatch: pytest.MonkeyPatch, most: int, error: BaseException) -> list[int]:
    """Let memory run out wherever more than `most` questions are computed at once; returns the sizes that went well."""
    real, sizes = Batches.loss, []

    def loss(self: Batches, groups: Any) -> Any:
        if (size := sum(map(len, groups))) > most:
            raise error
        sizes.append(size)
        return real(self, groups)

    monkeypatch.setattr(Batches, "loss", loss)
    return sizes


ERRORS = [MemoryError(), RuntimeError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: not enough")]


@pytest.mark.parametrize("error", ERRORS, ids=["python", "cuda", "cpu"])
@pytest.mark.parametrize("most", [6, 1])
def test_training_in_smaller_parts_gives_the_same_adapter(
    tiny: Path,
    samples: list[Sample],
    start: adapters.State,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    most: int,
) -> None:
    whole = trainer.train(samples, tiny, start, steps=8, batch=12, bits=32)
    sizes = short(monkeypatch, most, error)
    if most == 1:
        monkeypatch.setattr(Batches, "probe", lambda self: 0.0)  # it needs a picture's four questions at once
    parts = trainer.train(samples, tiny, start, steps=8, batch=12, bits=32)
    assert whole.at_once is None and parts.at_once is not None and parts.at_once <= most
    assert max(sizes) <= most and parts.steps == whole.steps
    assert parts.losses == pytest.approx(whole.losses, abs=2e-5)
    for name, array in whole.state.items():
        np.testing.assert_allclose(parts.state[name], array, atol=2e-4)
    assert any(not np.array_equal(parts.state[name], start[name]) for name in start)


def test_a_probe_without_memory_for_all_goes_picture_by_picture(
    tiny: Path, samples: list[Sample], start: adapters.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loaded = trainer._attach(tiny, 32, start, 8.0)
    trainer._fill(model, start, ("B",))
    made = Batches(samples, model, loaded, [adapters.module(name) for name in start], 4, 0)
    whole = made.probe()
    short(monkeypatch, 4, MemoryError())
    assert made.probe() == pytest.approx(whole, abs=1e-5)


def test_where_not_even_one_question_fits_it_is_said_plainly(
    tiny: Path, samples: list[Sample], start: adapters.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batches, "probe", lambda self: 0.0)
    short(monkeypatch, 0, MemoryError())
    with pytest.raises(trainer.TrainingFailed, match="not enough memory for a single question"):
        trainer.train(samples, tiny, start, steps=8, batch=12)


def test_another_failure_is_not_taken_for_one_of_memory(
    tiny: Path, samples: list[Sample], start: adapters.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batches, "probe", lambda self: 0.0)
    short(monkeypatch, 0, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trainer.train(samples, tiny, start, steps=8, batch=12)


def test_parts_hold_every_row_once_and_no_more_than_asked() -> None:
    groups = [[0, 1, 2, 3], [4], [5, 6, 7], [8, 9]]
    assert steps.split(groups, None) == [groups]
    for most in range(1, 11):
        parts = steps.split(groups, most)
        assert [row for part in parts for group in part for row in group] == list(range(10))
        assert all(0 < sum(map(len, part)) <= most for part in parts)


def test_the_proximal_term_keeps_a_clinic_near_the_rounds_start(
    tiny: Path, samples: list[Sample], start: adapters.State
) -> None:
    def moved(mu: float) -> float:
        done = trainer.train(samples, tiny, start, ("B",), 25, lr=1e-2, alpha=8.0, mu=mu).state
        return float(np.sqrt(sum(np.sum((done[name] - start[name]) ** 2) for name in start)))

    free, held, tight = moved(0.0), moved(1.0), moved(10.0)
    assert tight < held < free


CAPPED = """
import sys
from pathlib import Path
from client import memory, trainer
from model import adapters, memory as held, phantoms
base, room = Path(sys.argv[1]), int(sys.argv[2])
import torch, transformers, peft
state = adapters.initial(base, 2, 8.0, "decoder", 0)
samples = phantoms.make(40, ["plain"], seed=1, size=48) * 4
trainer.train(samples[:8], base, state, ("B",), 1)  # everything is loaded once
memory.free()
held.reset_highest()  # loading took more for a moment than training does
most = held.resident_bytes() // memory.MIB + room
done = trainer.train(samples, base, state, ("B",), 2, batch=512, bits=32, most_mib=most if room else 0)
print(done.steps, done.at_once, most, held.highest_resident_bytes() / memory.MIB)
"""


@pytest.mark.slow
def test_a_real_cap_on_memory_is_kept_by_smaller_parts(tiny: Path) -> None:
    """The kernel refuses the allocations, torch says so, and training goes on with less at once."""
    peaks = {}
    for room in (0, 150):
        line = [sys.executable, "-c", CAPPED, str(tiny), str(room)]
        done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        count, at_once, most, peak = done.stdout.splitlines()[-1].split()
        assert count == "2"
        peaks[room] = float(peak)
        if room:
            assert at_once != "None" and float(peak) <= int(most) + 32
        else:
            assert at_once == "None"
    print("peak MiB without and with a cap:", peaks)
    assert peaks[150] < peaks[0]


def test_a_process_above_the_cap_does_not_begin(tiny: Path, samples: list[Sample], start: adapters.State) -> None:
    with pytest.raises(memory.MemoryShort, match="this clinic allows 1"):
        trainer.train(samples, tiny, start, steps=8, most_mib=1)


@pytest.mark.parametrize(("total", "rising"), [(2, 1), (24, 10), (54, 22), (200, 24), (3240, 162)])
def test_the_rate_rises_while_the_moments_are_noise_and_falls_to_a_floor(total: int, rising: int) -> None:
    rates = [steps.rate(step, total) for step in range(total)]
    assert rates[0] == pytest.approx(1 / rising) and rates[rising - 1] == 1
    assert np.all(np.diff(rates[:rising]) > 0) and np.all(np.diff(rates[rising:]) < 0)
    assert min(rates[rising:]) >= steps.FLOOR and steps.rate(total, total) == pytest.approx(steps.FLOOR)
