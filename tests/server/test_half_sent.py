"""A clinic that announces its reply and then sends it object by object without an end, over the real link.

The three clinics are Flower's own connection in threads of this test, so that each sends what it likes.
"""

import threading
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supernode.fleet_http_connection import http_request_response

from scripts.federation import Local
from tests.server import fakes

DEADLINE = 12.0  # seconds of the round
EVERY = 4.0  # seconds between two objects of the endless reply, each of which keeps Flower's session for it open


class Clinic(threading.Thread):
    """Answers train messages with an honest update and releases with an installation; `half`: never to the end."""

    def __init__(self, local: Local, name: str, half: bool) -> None:
        super().__init__(daemon=True)
        self.local, self.key, self.half = local, local.out / "certs/clinics" / name / "node.key", half
        self.over = threading.Event()

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
                wanted, session = send(reply, get_object_tree(reply), 0.1)
                objects = get_all_nested_objects(reply)
                for name in sorted(wanted)[: -1 if self.half else None]:
                    push(run, session, name, objects[name].deflate())
                    if self.half and self.over.wait(EVERY):
                        return


def _answer(message: Message, step: float) -> RecordDict:
    """An update by `step`; one like another clinic's would need no sending, since the link knows its objects."""
    if message.metadata.message_type.startswith("query"):
        return fakes.installs(0, message)
    return fakes.reply(fakes.moved(message, step), fakes.asked(message)[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.verify=<str>. is deprecated:DeprecationWarning")
def test_a_reply_without_an_end_costs_the_others_nothing_over_the_link(tmp_path: Path, tiny: Path) -> None:
    fakes.FakeGrid({})  # makes this process a task, without which Flower builds no message
    names = ("north", "south", "west")
    homes = {name: tmp_path / name for name in names}
    with Local(homes, tmp_path / "out", tiny, later=names) as local:
        clinics = [Clinic(local, name, name == "west") for name in names]
        for clinic in clinics:
            clinic.start()
        start = time.monotonic()
        config = {"num-server-rounds": 1, "min-clinics": 2, "round-deadline": DEADLINE, "gate": "off", "rank": 2}
        events = local.rounds(config)
        took = time.monotonic() - start
        for clinic in clinics:
            clinic.over.set()
    done = next(event for event in events if event["event"] == "round-done")
    assert done["changed"] and "2 of 3 replies" in done["reason"] and done["seconds"] < 2 * DEADLINE
    assert {event["clinic"] for event in events if event["event"] == "accepted"} == {"north", "south"}
    late = [(event["clinic"], event["reason"]) for event in events if event["event"] == "rejected"]
    assert late == [("west", "no reply before the deadline")]
    assert {event["clinic"] for event in events if event["event"] == "installed"} == {"north", "south"}
    assert took < 6 * DEADLINE  # Flower by itself waits for over an hour
