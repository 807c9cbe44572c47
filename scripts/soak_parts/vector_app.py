"""A Flower app of known weight: random bytes go to one clinic, as many other random bytes come back.

It shows what the transport does with an adapter of any size, without a model. `transfer` makes an app of this file and
submits it; the server's half writes what happened as JSON to the file in the run configuration. Nothing is learnt.
"""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server = ServerApp()
client = ClientApp()


def vector(size: int, seed: int) -> np.ndarray:
    """`size` random bytes, which nothing on the way can make smaller."""
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(array.tobytes()).hexdigest()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Send the vector to the first clinic there is, wait for its answer, write down when and whether all arrived."""
    size, seed = int(context.run_config["size"]), int(context.run_config["seed"])
    limit = float(context.run_config["seconds"])
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    sent = vector(size, seed)
    content = RecordDict({"arrays": ArrayRecord({"v": Array(sent)}), "config": ConfigRecord({"seed": seed + 1})})
    asked = time.time()
    messages = [Message(content, nodes[0], MessageType.TRAIN, ttl=limit + 600)]
    reply = next(iter(grid.send_and_receive(messages, timeout=limit)), None)
    found: dict[str, object] = {"asked": asked, "answered": time.time(), "whole": False, "error": "no reply"}
    if reply is not None and reply.has_error():
        found["error"] = str(reply.error)
    elif reply is not None:
        back = np.asarray(reply.content["arrays"]["v"].numpy())
        about = reply.content["config"]
        whole = digest(back) == digest(vector(size, seed + 1)) and about["digest"] == digest(sent)
        found |= {"arrived": about["arrived"], "whole": whole, "error": ""}
    Path(str(context.run_config["report"])).write_text(json.dumps(found), encoding="utf-8")


@client.train()
def train(message: Message, context: Context) -> Message:
    """Answer with as many other bytes, the digest of what came, and when it was all there."""
    arrived = time.time()
    came = np.asarray(message.content["arrays"]["v"].numpy())
    seed = int(message.content["config"]["seed"])
    about = ConfigRecord({"arrived": arrived, "digest": digest(came)})
    content = RecordDict({"arrays": ArrayRecord({"v": Array(vector(came.size, seed))}), "config": about})
    return Message(content, reply_to=message)
