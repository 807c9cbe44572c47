"""How a clinic of a soak behaves: it trains, or stands in for training, or lies. Runs inside that clinic's ClientApp.

A clinic owns its machine, so it can change what it sends wherever it likes; here that is where Flower calls the app.
What it does stands in a file that is read at every message: "train", "quick" or the name of a lie. "quick" moves the
adapter by numbers that depend on round and clinic alone and takes two seconds: importing torch takes longer than
training so small a model, and on the server's side nothing depends on it.
"""

import os
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FILE = "AFYA_SOAK_CLINIC"  # names the file
STEPS_SECONDS = 2.0
HERE = Path(__file__).resolve().parent


def environment(file: Path) -> dict[str, str]:
    """What a SuperNode's environment must hold so that its clinic behaves as `file` says."""
    path = [str(HERE / "hook"), str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {FILE: str(file), "PYTHONPATH": os.pathsep.join(path)}


def take_over() -> None:
    """Put this module between Flower and the app."""
    from flwr.clientapp import ClientApp

    honest = ClientApp.__call__

    def call(self: Any, message: Any, context: Any) -> Any:
        from flwr.app import Message

        what = Path(os.environ[FILE]).read_text(encoding="utf-8").strip()
        if what != "train":
            from client import local_round

            stand_in: Any = _stand_in  # gives what the round reads of a `Trained`, no more
            local_round._train = stand_in
        reply = honest(self, message, context)
        if what in ("train", "quick") or message.metadata.message_type != "train":
            return reply
        from scripts.soak_parts.lies import LIES

        return Message(LIES[what].tell(message.content, reply.content), reply_to=message)

    ClientApp.__call__ = call


def _stand_in(request: Any, allowed: Any, samples: list[Any], base: Path, state: Any, home: Path, *_: Any) -> Any:
    """In place of `client.local_round._train`: some movement of the asked factors, the same whenever it is repeated."""
    draw = np.random.default_rng([request.server_round, zlib.crc32(home.name.encode())])
    for step in range(request.local_steps):
        time.sleep(STEPS_SECONDS / request.local_steps)
        print(f"step {step + 1}/{request.local_steps}", flush=True)
    size = request.lr * request.local_steps / 4
    moved = {
        name: (array + size * draw.uniform(-1, 1, array.shape)).astype(np.float32)
        if name.removesuffix(".weight").endswith(tuple(f"lora_{factor}" for factor in request.factor))
        else array
        for name, array in state.items()
    }
    given = {"steps": request.local_steps, "waited": 0.0, "loss_before": 1.0, "loss_after": 1.0, "peak_rss_mib": 0.0}
    return SimpleNamespace(state=moved, cases=len({sample.group for sample in samples}), **given)
