"""A clinic that trains until it is ended, printing the time of every step: run as a program by test_courtesy.py.

usage: python -m tests.client.slow_trainer HOME BASE
"""

import sys
import time
from pathlib import Path

from client import trainer
from client.courtesy import Courtesy
from model import adapters, phantoms


def main() -> None:
    """Steps of a tiny model, a few hundredths of a second each."""
    home, base = Path(sys.argv[1]), Path(sys.argv[2])
    state = adapters.initial(base, 2, 8.0, "decoder", 0)

    def say(step: int, steps: int, loss: float) -> None:
        print(time.monotonic(), flush=True)

    trainer.train(
        phantoms.make(3, ["plain"], seed=2, size=48),
        base,
        state,
        ("B",),
        100_000,
        lr=1e-5,
        threads=1,
        seconds=60,
        courtesy=Courtesy(home),
        progress=say,
    )


if __name__ == "__main__":
    main()
