"""A clinic that sends its reply object by object without an end, and one that announces thousands of parts.

Over the real link, where each announced part is a row that the SuperLink writes while nobody else may.

The three clinics are Flower's own connection in threads of this test, so that each sends what it likes.
"""

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supernode.fleet_http_connection import http_request_response

from scripts.federation import Local
from tests.server import fakes

DEADLINE = 20.0  # seconds of the round
EVERY = 4.0  # seconds between two objects of the endless reply, each of which keeps Flower's session for it open


class Clinic(threading.Thread):
    """Answers train messages with an honest update and releases with an installation.

    `half`: never to the end; `flood`: parts only.
    """

    def __init__(self, local: Local, name: str, half: bool = False, flood: bool = False) -> None:
        super().__init__(daemon=True)
        self.flood = flood
        self.local, self.key, self.half = local, local.out / "certs/clinics" / name / "node.key", half
        self.over, self.flooded = threading.Event(), False

    def run(self) -> None:
        private = serialization.load_ssh_private_key(self.key.read_bytes(), None)
        keys = (private, private.public_key())
        authority = str(self.local.out / "certs/ca.crt")
        with http_request_response(self.local.server, False, authority, keys) as connection:
            _, receive, send, _, _, pull, push, confirm = connection
            while not self.over.wait(0.5):
                if (found := receive()) is None:
                    continue
                message, tree = found
                run, names = message.metadata.run_id, [part.object_id for part in iterate_object_tree(tree)]
                contents = pull_objects(names, lambda name, run=run: pull(run, name))
                whole = inflate_object_from_contents(message.metadata.message_id, contents)
                whole.metadata.__dict__["_message_id"] = message.metadata.message_id
                confirm(run, message.metadata.message_id)
                reply = Message(_answer(whole, 0.002 if self.half else 0.001), reply_to=whole)
                reply.metadata.__dict__["_message_id"] = reply.object_id
                if self.flood:
                    self._flood(lambda tree, reply=reply: send(reply, tree, 0.1))
                    continue
                wanted, session = send(reply, get_object_tree(reply), 0.1)
                objects = get_all_nested_objects(reply)
                # All but the reply's own object, which no other clinic sends in its stead.
                for name in sorted(set(wanted) - ({reply.object_id} if self.half else set())):
                    push(run, session, name, objects[name].deflate())
                    if self.half and self.over.wait(EVERY):
                        return

    def _flood(self, announce: Callable[[ObjectTree], object]) -> None:
        """One announcement that the proxy refuses, and one that it passes on."""
        with pytest.raises(httpx.HTTPStatusError, match="413"):
            announce(invented(10_000))
        announce(invented(1000))
        self.flooded = True


def invented(parts: int) -> ObjectTree:
    """A tree of objects that do not exist."""
    names = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(parts)]
    return ObjectTree(object_id=names[0], children=[ObjectTree(object_id=name) for name in names[1:]])


def _answer(message: Message, step: float) -> RecordDict:
    """An update by `step`; one like another clinic's would need no sending, since the link knows its objects."""
    if message.metadata.message_type.startswith("query"):
        return fakes.installs(0, message)
    return fakes.reply(fakes.moved(message, step), fakes.asked(message)[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.verify=<str>. is deprecated:DeprecationWarning")
def test_a_reply_without_an_end_costs_the_others_nothing_over_the_link(tmp_path: Path, tiny: Path) -> None:
    fakes.FakeGrid({})  # makes this process a task, without which Flower builds no message
    names = ("north", "south", "west", "east")
    homes = {name: tmp_path / name for name in names}
    with Local(homes, tmp_path / "out", tiny, later=names) as local:
        clinics = [Clinic(local, name, name == "west", name == "east") for name in names]
        for clinic in clinics:
            clinic.start()
        start = time.monotonic()
        config = {"num-server-rounds": 1, "min-clinics": 2, "round-deadline": DEADLINE, "gate": "off", "rank": 2}
        events = local.rounds(config)
        took = time.monotonic() - start
        for clinic in clinics:
            clinic.over.set()
    done = next(event for event in events if event["event"] == "round-done")
    assert done["changed"] and "2 of 4 replies" in done["reason"] and done["seconds"] < 2 * DEADLINE
    assert {event["clinic"] for event in events if event["event"] == "accepted"} == {"north", "south"}
    late = {event["clinic"]: event["reason"] for event in events if event["event"] == "rejected"}
    assert late["west"] == "no reply before the deadline" and set(late) == {"west", "east"}
    assert {event["clinic"] for event in events if event["event"] == "installed"} == {"north", "south"}
    assert clinics[3].flooded
    assert took < 6 * DEADLINE  # Flower by itself waits for over an hour
