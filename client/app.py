"""Flower's ClientApp of a clinic: takes a message, lets the limits decide, trains or installs, answers.

Flower starts a new process for each message, so nothing heavy is imported before a request has been accepted.
Not here: who may connect (registered keys, TLS) and what lies in training/ (the kiosk's consent gate decides).
"""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client import limits
from model import adapters, files, wire
from model.adapters import AdapterRejected

if TYPE_CHECKING:
    from client.trainer import Trained

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the factors that are asked for on this clinic's consented samples, or refuse with the reason."""
    return Message(train_reply(message.content, files.home()), reply_to=message)


@app.query()
def release(message: Message, context: Context) -> Message:
    """Check a released adapter and install it where this clinic's kiosk finds it, or refuse with the reason."""
    return Message(release_reply(message.content, files.home()), reply_to=message)


def train_reply(content: RecordDict, home: Path) -> RecordDict:
    """Answer to a train message: the trained factor with metrics, or the reason of the refusal."""
    from model.data import DataError, read_training
    from model.llava import ModelError, base_sha256
    from model.presets import PresetMissing

    start = time.monotonic()
    try:
        allowed = limits.read_limits(home)
        request = limits.parse(_only(content.config_records, "config"))
        state = wire.unpack(_only(content.array_records, "arrays"), wire.read_layout(request.layout))
        base = limits.base_model(home)
        spec = adapters.spec_of(state, request.alpha, request.base_sha256)
        adapters.check(state, spec)
        samples = read_training(home / "training")
        limits.check(request, spec, allowed, base_sha256(base), len(samples))
        from client import trainer

        trained = trainer.train(
            samples,
            base,
            state,
            tuple(request.factor),
            request.local_steps,
            lr=request.lr,
            batch=request.batch_size,
            alpha=request.alpha,
            seed=request.seed + request.server_round,
            seconds=allowed.max_seconds,
            threads=allowed.threads or None,
            progress=_say,
        )
    except (limits.Refused, limits.SettingsWrong, AdapterRejected, DataError, ModelError, PresetMissing) as error:
        return _refusal(str(error))
    except RuntimeError as error:  # out of memory, a loss that is no number: this round is lost, the clinic goes on
        return _refusal(f"training stopped: {error}")
    return _trained(trained, request, time.monotonic() - start)


def _trained(trained: "Trained", request: limits.Request, seconds: float) -> RecordDict:
    """The factors that were asked for, and what a coordinator may know of how it was made."""
    moved = {name: array for name, array in trained.state.items() if adapters.factor(name) in request.factor}
    metrics = {
        "num-examples": trained.examples,
        "server-round": request.server_round,
        "steps": trained.steps,
        "loss-before": trained.loss_before,
        "loss-after": trained.loss_after,
        "seconds": seconds,
        "cpu-seconds": time.process_time(),
        "peak-rss-mib": trained.peak_rss_mib,
        "bytes": adapters.state_bytes(moved),
    }
    arrays = {wire.key(factor): Array(wire.pack(moved, factor)) for factor in request.factor}
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)})


def release_reply(content: RecordDict, home: Path) -> RecordDict:
    """Answer to a release: the name under which the adapter was installed, or the reason of the refusal."""
    import json

    from model.llava import ModelError, base_sha256
    from model.presets import PresetMissing

    try:
        config = _only(content.config_records, "config")
        state = wire.unpack(_only(content.array_records, "arrays"), wire.read_layout(str(config["layout"])))
        evidence = json.loads(str(config["evidence"]))
        spec = adapters.spec_of(state, float(config["alpha"]), str(config["base-sha256"]))
        limits.check_targets(spec, limits.read_limits(home))
        own = base_sha256(limits.base_model(home))
        if spec.base_sha256 != own:
            raise limits.Refused(f"the adapter is for the base {spec.base_sha256[:12]}, this clinic has {own[:12]}")
        with tempfile.TemporaryDirectory(prefix="afya-release-") as scratch:
            folder = Path(scratch) / "adapter"
            adapters.save(folder, state, spec)
            digest = adapters.sha256(folder)
            if digest != config["sha256"]:
                raise limits.Refused("the adapter that arrived is not the one that was released (other hash)")
            name = adapters.install(home, folder, evidence=evidence)
    except (limits.Refused, limits.SettingsWrong, AdapterRejected, ModelError, PresetMissing) as error:
        return _refusal(str(error))
    except (KeyError, TypeError, ValueError) as error:
        return _refusal(f"the release is not readable: {error}")
    print(f"Adapter {name} installed.", flush=True)
    return RecordDict({"config": ConfigRecord({"installed": name, "sha256": digest})})


def _refusal(reason: str) -> RecordDict:
    print(f"Refused: {reason}", flush=True)
    return RecordDict({"config": ConfigRecord({"refused": reason})})


def _only(records: dict, key: str) -> dict:
    """The one record of its kind, which must be called `key`. Raises Refused."""
    if set(records) != {key}:
        raise limits.Refused(f"the message must hold one record {key!r} of its kind, it holds {sorted(records)[:9]}")
    return records[key]


def _say(step: int, steps: int, loss: float) -> None:
    """Progress in the clinic's own log, about ten lines a round."""
    if step == steps or step % max(1, steps // 10) == 0:
        print(f"step {step}/{steps} loss {loss:.3f}", flush=True)
