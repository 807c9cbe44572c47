"""Simulated clinics for `scripts/bench simulation`: the real client app, each clinic with a home of its own.

A clinic's home (settings, a dozen examples) is made when it is first asked. The clinics are not alike: each has one
kind of picture (`model.phantom_scanners`) and one answer that it gives oftener than others do. Some fall out: their
training dies in the middle of a round.
"""

import json
import random
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from PIL import Image

WORDS = ("What is shown?", "Is it normal?", "Which side?")
ANSWERS = ("lung", "yes", "left", "liver", "no", "right")
EXAMPLES = 12


def client_app(work: Path, base: Path, drop: float, steps_allowed: int = 64) -> ClientApp:
    """Flower's app of all clinics: the handlers of `client.app`, with the home of the clinic that is asked."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from client.app import train_reply

        number = int(context.node_config["partition-id"])
        round_number = message.content.config_records["config"]["server-round"]
        if random.Random(f"{number} {round_number}").random() < drop:
            raise RuntimeError("the clinic fell out in the middle of its training")
        return Message(train_reply(message.content, home(work, base, number, steps_allowed)), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        from client.app import evaluate_reply

        number = int(context.node_config["partition-id"])
        return Message(evaluate_reply(message.content, home(work, base, number, steps_allowed)), reply_to=message)

    @app.query()
    def release(message: Message, context: Context) -> Message:
        from client.app import release_reply

        number = int(context.node_config["partition-id"])
        return Message(release_reply(message.content, home(work, base, number, steps_allowed)), reply_to=message)

    return app


def home(work: Path, base: Path, number: int, steps_allowed: int) -> Path:
    """The clinic's home, made now if it is not there yet."""
    folder = work / "clinics" / f"{number:06d}"
    if (folder / "afya.toml").exists():
        return folder
    draw = np.random.default_rng(number)
    (folder / "training/samples").mkdir(parents=True, exist_ok=True)
    (folder / "training/images").mkdir(exist_ok=True)
    folder.chmod(0o700)
    shade, favourite = int(draw.integers(40, 216)), str(draw.choice(ANSWERS))
    for case in range(EXAMPLES):
        picture = np.clip(draw.normal(shade, 20, (48, 48, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"training/images/{case}.png")
        answer = favourite if draw.random() < 0.7 else str(draw.choice(ANSWERS))
        row = {"id": f"{case:04d}", "image": f"{case}.png", "question": str(draw.choice(WORDS)), "answer": answer}
        row |= {"answer_type": "open", "group": f"case-{case}", "source": "kiosk"}
        (folder / f"training/samples/{case:04d}.json").write_text(json.dumps(row), encoding="utf-8")
    limits = f"min_examples = 4\nmin_cases = 4\nmin_steps = 1\nmax_steps = {steps_allowed}\n"
    text = f"model = {json.dumps(str(base))}\n[client]\n{limits}"
    (folder / "afya.toml").write_text(text, encoding="utf-8")
    return folder
