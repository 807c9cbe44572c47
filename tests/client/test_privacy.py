"""DP-SGD: one patient's whole share is clipped, the noise is what it says, weights move, and the ledger is charged."""

import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

from client import app, ledger, privacy, trainer
from client.batches import Batches
from client.privacy import Noise, PrivateGradient
from client.steps import Gradient
from model import adapters, phantoms
from model.data import Sample
from tests.client.clinic import fill, request


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return phantoms.make(6, ["plain"], seed=1, size=48)


@pytest.fixture(scope="module")
def start(tiny: Path) -> adapters.State:
    return adapters.initial(tiny, 2, 8.0, "decoder", 0)


@pytest.fixture
def gradient(tiny: Path, samples: list[Sample], start: adapters.State) -> Gradient:
    model, loaded = trainer._attach(tiny, 32, start, 8.0)
    trainer._fill(model, start, ("B",))
    made = Batches(samples, model, loaded, [adapters.module(name) for name in start], 4, 0)
    return Gradient(made, [p for p in model.parameters() if p.requires_grad])


def norm(gradient: Gradient | PrivateGradient) -> float:
    return float(np.sqrt(sum(float(p.grad.double().square().sum()) for p in gradient.parameters)))


def everyone(count: int) -> bytes:
    """An entropy source in which everybody is taken and no noise is drawn."""
    return bytes(count)


def test_a_patients_questions_are_one_unit_and_clipped_as_one(gradient: Gradient, samples: list[Sample]) -> None:
    patients = gradient.batches.patients()
    assert len(patients) == len({sample.group for sample in samples})
    for groups, name in zip(patients, sorted({s.group for s in samples}), strict=True):
        rows = sorted(row for group in groups for row in group)
        assert rows == [row for row, sample in enumerate(samples) if sample.group == name]
    alone = []
    for groups in patients:
        gradient.clear()
        gradient.of(groups)
        alone.append((norm(gradient), [p.grad.double().clone() for p in gradient.parameters]))
    clip = float(np.median([length for length, _ in alone]))
    private = PrivateGradient(gradient, patients, Noise(1e-300, clip, 1.0), everyone)
    private.step()
    for number, parameter in enumerate(gradient.parameters):
        clipped = sum(grads[number] * min(1.0, clip / length) for length, grads in alone) / len(patients)
        np.testing.assert_allclose(parameter.grad.double(), clipped, atol=1e-5 * clip)


def test_one_patient_more_changes_the_sum_by_the_clip_at_most(gradient: Gradient) -> None:
    patients, clip = gradient.batches.patients(), 0.01
    sums = []
    for count in (len(patients), len(patients) - 1):
        private = PrivateGradient(gradient, patients[:count], Noise(1e-300, clip, 1.0), everyone)
        private.step()
        sums.append([p.grad.double() * count for p in gradient.parameters])
    distance = float(np.sqrt(sum(float((a - b).square().sum()) for a, b in zip(*sums, strict=True))))
    assert 0.5 * clip < distance <= clip * (1 + 1e-4)


def test_a_patient_whose_gradient_is_no_number_adds_nothing(
    gradient: Gradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Batches.loss
    patients = gradient.batches.patients()
    monkeypatch.setattr(Batches, "loss", lambda self, g: real(self, g) * (float("nan") if g == patients[0] else 1.0))
    loss = PrivateGradient(gradient, patients, Noise(1e-300, 0.1, 1.0), everyone).step()
    assert np.isfinite(loss) and np.isfinite(norm(gradient)) and norm(gradient) > 0


def test_the_noise_is_normal_and_as_large_as_it_says(gradient: Gradient) -> None:
    drawn = privacy.normal(200_001)
    assert len(drawn) == 200_001 and abs(drawn.mean()) < 0.015 and abs(drawn.std() - 1) < 0.01
    assert abs((drawn**4).mean() - 3) < 0.15 and abs(np.corrcoef(drawn[:100_000], drawn[100_001:])[0, 1]) < 0.02
    patients = gradient.batches.patients()
    private = PrivateGradient(gradient, patients, Noise(1000.0, 0.5, 0.5))
    private.step()
    values = np.concatenate([p.grad.numpy().ravel() for p in gradient.parameters])
    assert values.std() == pytest.approx(1000.0 * 0.5 / (0.5 * len(patients)), rel=0.1)


def test_each_patient_is_taken_at_the_rate_and_neither_seed_nor_order_decides(gradient: Gradient) -> None:
    taken = privacy.uniform(100_000) < 0.2
    assert taken.mean() == pytest.approx(0.2, abs=0.006)
    import torch

    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        draws.append(privacy.normal(8).tolist())
    assert draws[0] != draws[1]


def test_private_training_moves_the_weights_and_learns(tiny: Path, start: adapters.State) -> None:
    many = phantoms.make(20, ["plain"], seed=3, size=48)
    done = trainer.train(many, tiny, start, ("B",), 25, lr=1e-2, alpha=8.0, noise=Noise(0.5, 0.5, 0.5))
    assert done.steps == 25 and done.loss_after < done.loss_before
    assert all(not np.array_equal(done.state[n], start[n]) for n in start if adapters.factor(n) == "B")
    assert all(np.array_equal(done.state[n], start[n]) for n in start if adapters.factor(n) == "A")


PRIVATE = "min_examples = 4\ndp = true\ndp_epsilon = 9.0\ndp_noise = 0.6\ndp_delta = 1e-4"


def answered(content: RecordDict, home: Path) -> RecordDict:
    return app.train_reply(content, home)


def test_rounds_leave_until_the_budget_is_spent_and_not_one_more(
    tmp_path: Path, tiny: Path, start: adapters.State, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = fill(tmp_path / "clinic", samples, tiny, PRIVATE)
    spent = []
    for number in range(1, 12):
        before = len(ledger.read(home))
        content = answered(request(tiny, start, server_round=number), home)
        if "refused" in content.config_records.get("config", {}):
            break
        metrics = content.metric_records["metrics"]
        assert len(ledger.read(home)) == before + 1
        assert not {"loss-before", "loss-after", "cpu-seconds", "peak-rss-mib"} & set(metrics)
        assert any(content.array_records["arrays"][name].numpy().any() for name in content.array_records["arrays"])
        spent.append(float(metrics["dp-epsilon"]))
    assert spent and spent == sorted(spent) and spent[-1] <= 9.0
    assert "privacy budget" in str(content.config_records["config"]["refused"])
    monkeypatch.setattr("client.trainer.train", lambda *a, **k: pytest.fail("trained all the same"))
    assert set(answered(request(tiny, start, server_round=99), home)) == {"config"}
    assert len(ledger.read(home)) == len(spent)


def test_nothing_leaves_when_the_ledger_cannot_be_written(
    tmp_path: Path, tiny: Path, start: adapters.State, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = fill(tmp_path / "clinic", samples, tiny, PRIVATE)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger, "write_atomic", full)
    content = answered(request(tiny, start), home)
    assert set(content) == {"config"} and "No space" in str(content.config_records["config"]["refused"])


@pytest.mark.parametrize("change", ["dp_delta = 0.9", "dp_epsilon = 1000.0", "dp_noise = 0.0", "dp = 1"])
def test_settings_that_protect_nothing_are_refused(
    tmp_path: Path, tiny: Path, start: adapters.State, samples: list[Sample], change: str
) -> None:
    lines = [line for line in PRIVATE.splitlines() if line.split(" =")[0] != change.split(" =")[0]]
    home = fill(tmp_path / "clinic", samples, tiny, "\n".join([*lines, change]))
    content = answered(request(tiny, start), home)
    assert change.split(" =")[0] in str(content.config_records["config"]["refused"])


def test_the_accountant_is_asked_for_where_it_is_missing(
    tmp_path: Path, tiny: Path, start: adapters.State, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = fill(tmp_path / "clinic", samples, tiny, PRIVATE)
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    content = answered(request(tiny, start), home)
    assert "afya[privacy]" in str(content.config_records["config"]["refused"])
    assert not (home / "privacy/ledger.json").exists()
