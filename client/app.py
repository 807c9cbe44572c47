"""Flower's ClientApp of a clinic: takes a message, lets the limits decide, trains, examines or installs, answers.

Flower starts a new process for each message, so nothing heavy is imported before a request has been accepted.
Not here: who may connect (registered keys, TLS) and what lies in training/ (the kiosk's consent gate decides).
"""

import datetime
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client import courtesy, limits
from model import files
from model.adapters import AdapterRejected

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the factors that are asked for on this clinic's consented samples, or refuse with the reason."""
    courtesy.be_nice(limits.niceness(files.home()))
    return Message(train_reply(message.content, files.home()), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Examine a candidate adapter on this clinic's sealed set and answer with counts, or refuse with the reason."""
    courtesy.be_nice(limits.niceness(files.home()))
    return Message(evaluate_reply(message.content, files.home()), reply_to=message)


@app.query()
def release(message: Message, context: Context) -> Message:
    """Check a released adapter and install it where this clinic's kiosk finds it, or refuse with the reason."""
    return Message(release_reply(message.content, files.home()), reply_to=message)


def train_reply(content: RecordDict, home: Path, now: datetime.datetime | None = None) -> RecordDict:
    """Answer to a train message: the trained factor with metrics, or the reason of the refusal."""
    from client import local_round

    try:
        config, arrays = _only(content.config_records, "config"), _only(content.array_records, "arrays")
        reply = local_round.answer(config, arrays, home, now)
    except limits.Refused as error:
        return _refusal(str(error))
    record = ArrayRecord({key: Array(vector) for key, vector in reply.arrays.items()})
    return RecordDict({"arrays": record, "metrics": MetricRecord(dict(reply.metrics))})


def evaluate_reply(content: RecordDict, home: Path) -> RecordDict:
    """Answer to a candidate: counts of what it does on this clinic's sealed set, or the reason of the refusal."""
    from client import sealed

    try:
        config, arrays = _only(content.config_records, "config"), _only(content.array_records, "arrays")
        counts, digest = sealed.examine(config, arrays, home)
    except (limits.Refused, ValueError) as error:
        return _refusal(str(error))
    return RecordDict({"counts": MetricRecord(counts), "config": ConfigRecord({"sha256": digest})})


def release_reply(content: RecordDict, home: Path) -> RecordDict:
    """Answer to a release: the name under which the adapter was installed, or the reason of the refusal."""
    from client import received
    from model.llava import ModelError
    from model.presets import PresetMissing

    try:
        config, arrays = _only(content.config_records, "config"), _only(content.array_records, "arrays")
        name, digest, notice = received.install(config, arrays, home)
    except (limits.Refused, limits.SettingsWrong, AdapterRejected, ModelError, PresetMissing) as error:
        return _refusal(str(error))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return _refusal(f"the release is not readable: {error}")
    except OSError as error:
        return _refusal(f"the release cannot be written here: {error.strerror or error}")
    print(f"Adapter {name} installed{'; ' + notice if notice else ''}.", flush=True)
    return RecordDict({"config": ConfigRecord({"installed": name, "sha256": digest})})


def _refusal(reason: str) -> RecordDict:
    print(f"Refused: {reason}", flush=True)
    return RecordDict({"config": ConfigRecord({"refused": reason})})


def _only(records: dict, key: str) -> dict:
    """The one record of its kind, which must be called `key`. Raises Refused."""
    if set(records) != {key}:
        raise limits.Refused(f"the message must hold one record {key!r} of its kind, it holds {sorted(records)[:9]}")
    return records[key]
