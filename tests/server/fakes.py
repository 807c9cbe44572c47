"""A Flower Grid in one process: clinics are functions that get a message's content and give a reply's content.

The real messages, records and replies of Flower, without a link between them; time stands still unless told.
"""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from model import adapters, wire
from server.checkpoint import RoundCheckpoint
from server.settings import Settings

BASE = "cd" * 32
Clinic = Callable[[int, Message], RecordDict | Error | Exception | None]


def small_state(rank: int = 2, seed: int = 0) -> adapters.State:
    """A pair of A and B factors for each of two layers; B is zero, as at the start."""
    draw = np.random.default_rng(seed)
    state = {}
    for layer in ("q_proj", "v_proj"):
        name = f"base_model.model.model.language_model.layers.0.self_attn.{layer}"
        state[f"{name}.lora_A.weight"] = draw.normal(size=(rank, 6)).astype(np.float16).astype(np.float32)
        state[f"{name}.lora_B.weight"] = np.zeros((4, rank), np.float32)
    return state


def first(state: adapters.State | None = None) -> RoundCheckpoint:
    """Round 0 of a small adapter, with the settings that `settings` gives."""
    state = state or small_state()
    spec = adapters.spec_of(state, 16.0, BASE)
    config = {"targets": "decoder", "rank": spec.rank, "alpha": spec.alpha}
    return RoundCheckpoint(0, 0, "", False, "the initial factors", spec, state, config=config)


def replace_first(state: adapters.State, spec: adapters.AdapterSpec) -> RoundCheckpoint:
    """A checkpoint after round 3 with these factors."""
    return RoundCheckpoint(3, 3, "B", True, "3 of 3 replies aggregated", spec, state)


def settings(root: Path, base: Path, **values: Any) -> Settings:
    """Settings for a run in a test: rank 2, quorum 3, short deadline."""
    chosen = {"checkpoint_dir": str(root), "base_model": str(base), "rank": 2, "min_clinics": 3, "round_deadline": 60.0}
    return Settings(**{**chosen, "wait_hours": 60 / 3600, **values})


def asked(message: Message) -> tuple[int, str, dict[str, np.ndarray]]:
    """Round, factor and the vectors of a train message."""
    config = message.content.config_records["config"]
    record = message.content.array_records["arrays"]
    state = {name: record[name].numpy() for name in record}
    return int(config["server-round"]), str(config["factor"]), state


def reply(arrays: dict[str, Any], number: int, examples: object = 10, **metrics: object) -> RecordDict:
    """A reply as an honest clinic sends it; `arrays` may hold Flower Arrays or NumPy arrays."""
    record = ArrayRecord({n: a if isinstance(a, Array) else Array(np.asarray(a)) for n, a in arrays.items()})
    values: Any = {"num-examples": examples, "num-cases": examples, "server-round": number, **metrics}
    values = {"loss-before": 2.0, "loss-after": 1.0, **values}
    return RecordDict({"arrays": record, "metrics": MetricRecord(values)})


def moved(message: Message, step: float) -> dict[str, np.ndarray]:
    """The factors that a train message asks for, every value moved by `step`."""
    _, factors, state = asked(message)
    return {wire.key(factor): state[wire.key(factor)] + np.float32(step) for factor in factors}


def honest(step: float = 0.01, examples: int = 10) -> Clinic:
    """A clinic that moves every value by `step`."""

    def answer(node: int, message: Message) -> RecordDict:
        return reply(moved(message, step), asked(message)[0], examples)

    return answer


def installs(node: int, message: Message) -> RecordDict:
    """What a clinic says when it has installed a release."""
    digest = str(message.content.config_records["config"]["sha256"])
    return RecordDict({"config": ConfigRecord({"installed": f"round-{digest[:12]}", "sha256": digest})})


class FakeGrid(Grid):
    """Clinics by node number; each message is answered at once, out of order, or never (None)."""

    def __init__(self, clinics: dict[int, Clinic], seed: int = 0) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # no public way to be a task in a test
        self.clinics = clinics
        self.sent: list[Message] = []
        self.online = set(clinics)
        self.random = random.Random(seed)
        self._answers: dict[str, Message | Exception | None] = {}

    @property
    def run(self) -> Any:
        return None

    def set_run(self, run: Any) -> None:
        pass

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        return Message(*arguments, **named)

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.online)

    def get_nodes(self) -> Iterable[Any]:
        return [SimpleNamespace(node_id=node, name=f"clinic-{node}") for node in sorted(self.online)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.sent.append(message)
            number = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = number
            node = message.metadata.dst_node_id
            answer = self.answer(node, message)
            if isinstance(answer, (RecordDict, Error)):
                answer = Message(answer, reply_to=message)
            self._answers[number] = answer
            ids.append(number)
        return ids

    def answer(self, node: int, message: Message) -> RecordDict | Error | Exception | None:
        """What a clinic sends back: its function's reply to a train message, an installation of any release.

        Asked to examine a candidate it has no sealed set that is large enough, unless `examined` is replaced.
        """
        if message.metadata.message_type.startswith("evaluate"):
            return self.examined(node, message)
        if message.metadata.message_type.startswith("query"):
            return installs(node, message)
        return self.clinics[node](node, message)

    def examined(self, node: int, message: Message) -> RecordDict | Error | Exception | None:
        """A clinic's answer to a candidate."""
        return RecordDict({"config": ConfigRecord({"refused": "the sealed set is too small"})})

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = [self._answers.get(number) for number in message_ids]
        for answer in found:
            if isinstance(answer, Exception):
                raise answer
        return [answer for answer in found if isinstance(answer, Message)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(list(self.push_messages(messages)))


class Clock:
    """A clock that only moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
