"""One round at this clinic, however the request came: the limits decide, the trainer trains, the ledger is charged.

Used for messages (`client.app`) and for files on a stick (`client.rounds_file`), so that both get the same answer.
Reads $AFYA_HOME/training and the clinic's settings, nothing else of the clinic. Not here: how a reply travels.
"""

import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from client import ledger, limits, sealed
from model import adapters, wire

if TYPE_CHECKING:
    from client.trainer import Trained
    from model.data import Sample


@dataclass(frozen=True)
class Reply:
    """What leaves the clinic: one vector for each factor asked for, and plain numbers on how it was made."""

    arrays: dict[str, np.ndarray]
    metrics: dict[str, int | float]


def answer(
    config: Mapping[str, Any], arrays: Mapping[str, Any], home: Path, now: datetime.datetime | None = None
) -> Reply:
    """Train what is asked on the consented samples of `home`. `now` is the local time, there for tests.

    `config` and `arrays` are as they arrived (`model.wire`). Raises limits.Refused with the reason; then nothing has
    left and nothing is charged.
    """
    from client.courtesy import TimeOver
    from client.memory import MemoryShort
    from model.adapters import AdapterRejected
    from model.data import DataError
    from model.llava import ModelError
    from model.presets import PresetMissing

    try:
        return _answer(config, arrays, home, now or datetime.datetime.now())
    except (limits.SettingsWrong, AdapterRejected, DataError, ModelError, PresetMissing, MemoryShort, OSError) as error:
        raise limits.Refused(str(error)) from error
    except (RuntimeError, MemoryError, TimeOver) as error:  # this round is lost, the clinic goes on
        raise limits.Refused(f"training stopped: {error}") from error


def _answer(config: Mapping[str, Any], arrays: Mapping[str, Any], home: Path, now: datetime.datetime) -> Reply:
    from model.data import read_training
    from model.llava import base_sha256

    start = time.monotonic()
    allowed = limits.read_limits(home)
    request = limits.parse(config)
    seconds = limits.check_open(allowed, now)
    state = wire.unpack(arrays, wire.read_layout(request.layout))
    base = limits.base_model(home)
    spec = adapters.spec_of(state, request.alpha, request.base_sha256)
    adapters.check(state, spec)
    samples = sealed.open_to_training(home, read_training(home / "training"))
    cases = len({sample.group for sample in samples})
    limits.check(request, spec, allowed, base_sha256(base), len(samples), cases)
    cost = _cost(request, allowed, len(samples), cases, home) if allowed.dp else None
    sealed.note_training(home, samples)
    left = max(0.0, seconds - (time.monotonic() - start))
    trained = _train(request, allowed, samples, base, state, home, left, cost)
    _enough(trained, allowed)
    moved = wire.rounded({n: array for n, array in trained.state.items() if adapters.factor(n) in request.factor})
    vectors = {wire.key(factor): wire.pack(moved, factor) for factor in request.factor}
    metrics: dict[str, int | float] = {
        "num-examples": len(samples),
        "num-cases": cases,
        "server-round": request.server_round,
        "steps": trained.steps,
        "seconds": time.monotonic() - start,
        "waited-seconds": trained.waited,
        "bytes": sum(vector.nbytes for vector in vectors.values()),
    }
    if cost:  # losses and use of memory depend on the samples themselves and would tell more than was paid for
        spent = ledger.entry(cost.round, cost.multiplier, cost.rate, trained.steps)
        metrics["dp-epsilon"] = ledger.charge(home, spent, allowed.dp_epsilon, allowed.dp_delta)
    else:
        metrics |= {"loss-before": trained.loss_before, "loss-after": trained.loss_after}
        metrics |= {"cpu-seconds": time.process_time(), "peak-rss-mib": trained.peak_rss_mib}
    return Reply(vectors, metrics)


def _enough(trained: "Trained", allowed: limits.Limits) -> None:
    """Raise Refused for an update of too few patients (with `dp` the noise speaks for them) or steps."""
    if not allowed.dp and trained.cases < allowed.min_cases:
        raise limits.Refused(
            f"the update was made of {trained.cases} patients, and this clinic sends nothing below {allowed.min_cases}"
        )
    if trained.steps < allowed.min_steps:
        raise limits.Refused(
            f"the time was over after {trained.steps} steps, and this clinic sends nothing below {allowed.min_steps}"
        )


def _cost(request: limits.Request, allowed: limits.Limits, samples: int, cases: int, home: Path) -> ledger.Entry:
    """What the round will cost at most; asked of the budget before anything is trained. Raises Refused."""
    if allowed.dp_delta * cases >= 1:
        raise limits.Refused(
            f"dp_delta is {allowed.dp_delta:g}, too large for {cases} patients; it must be below 1/patients"
        )
    rate = min(1.0, request.batch_size / samples)
    cost = ledger.entry(request.server_round, allowed.dp_noise, rate, request.local_steps)
    ledger.check(home, cost, allowed.dp_epsilon, allowed.dp_delta)
    return cost


def _train(
    request: limits.Request,
    allowed: limits.Limits,
    samples: "list[Sample]",
    base: Path,
    state: adapters.State,
    home: Path,
    seconds: float,
    cost: ledger.Entry | None,
) -> "Trained":
    from client import trainer
    from client.courtesy import Courtesy
    from client.privacy import Noise

    return trainer.train(
        samples,
        base,
        state,
        tuple(request.factor),
        request.local_steps,
        lr=request.lr,
        lr_ratio=request.lr_ratio,
        batch=request.batch_size,
        alpha=request.alpha,
        seed=request.seed + request.server_round,
        mu=request.proximal_mu,
        noise=Noise(cost.multiplier, allowed.dp_clip, cost.rate) if cost else None,
        seconds=seconds,
        threads=allowed.threads or None,
        most_mib=allowed.max_memory_mib,
        courtesy=Courtesy(home),
        progress=_say,
    )


def _say(step: int, steps: int, loss: float) -> None:
    """Progress in the clinic's own log, about ten lines a round."""
    if step == steps or step % max(1, steps // 10) == 0:
        print(f"step {step}/{steps} loss {loss:.3f}", flush=True)
