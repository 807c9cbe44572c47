"""The whole loop: a correction at the kiosk, consent, a federated round, and another answer at the same running kiosk.

Everything is real but the link between server and clinics: store, consent gate, limits, 4-bit training, gate,
aggregation, release, installation, and the kiosk's own queue in front of its model (`tests/server/test_deployment.py`
has the link).
"""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from client import app
from kiosk import export, queries
from kiosk.desk import Desk, open_desk
from kiosk.records import NewImage
from model import adapters, images, phantoms
from model.backends import Request
from server import rounds
from tests.server import fakes

QUESTION = "What is seen in this image?"
CORRECTION = "nodule left"


def _kiosk(home: Path, tiny: Path) -> Desk:
    home.mkdir(mode=0o700)
    (home / "afya.toml").write_text(
        f'model = "{tiny}"\nbits = 4\nanswer_tokens = 8\n[client]\nmin_examples = 1\nmin_cases = 1\n'
    )
    return open_desk(home)


def _picture(seed: int) -> np.ndarray:
    return np.asarray(phantoms.make(1, ["plain"], seed=seed, size=48)[0].image)


def _ask(desk: Desk, picture: np.ndarray, case: int | None = None) -> tuple[int, int, str]:
    """Ask as the screen does: saved first, then answered; returns case, turn and the answer's text."""
    if case is None:
        new = NewImage(images.to_png(picture), "PNG", 0, 1, {})
        case, turn = desk.store.add_case(new, "nurse", QUESTION)
    else:
        turn = desk.store.add_turn(case, QUESTION, "nurse")
    job = desk.engine.submit(turn, Request(picture, QUESTION, (), desk.settings.answer_tokens))
    return case, turn, "".join(desk.engine.stream(job))


class _Federation(fakes.FakeGrid):
    """The clinics are the real ClientApp handlers, each with its own home."""

    def __init__(self, homes: dict[int, Path]) -> None:
        super().__init__(dict.fromkeys(homes, self._train))
        self.homes = homes

    def _train(self, node: int, message: Message) -> RecordDict:
        return app.train_reply(message.content, self.homes[node])

    def answer(self, node: int, message: Message) -> RecordDict | Error | Exception | None:
        if message.metadata.message_type.startswith("query"):
            return app.release_reply(message.content, self.homes[node])
        return super().answer(node, message)


@pytest.mark.slow
def test_a_correction_at_the_kiosk_changes_its_answer_after_a_round(tmp_path: Path, tiny: Path) -> None:
    homes = {1: tmp_path / "north", 2: tmp_path / "south"}
    desks: dict[int, Desk] = {}
    try:
        first = {}
        for node, home in homes.items():  # one after the other: each loads its model in a thread of its own
            desk = desks[node] = _kiosk(home, tiny)
            case, turn, text = _ask(desk, _picture(node))
            first[node] = (case, turn, text)
            assert text.strip() != CORRECTION
            export.review(desk.store, desk.home, turn, "corrected", "doctor", CORRECTION)
            assert not list((desk.home / "training/samples").iterdir())  # corrected, but nobody has consented
            export.set_consent(desk.store, desk.home, case, "training", "doctor", looked=True)
            assert len(list((desk.home / "training/samples").iterdir())) == 1

        values = {"num_server_rounds": 2, "min_clinics": 2, "rank": 8, "local_steps": 40, "lr": 1e-2}
        grid, clock = _Federation(homes), fakes.Clock()
        chosen = fakes.settings(tmp_path / "rounds", tiny, **values)
        after = rounds.federate(grid, chosen, sleep=clock.sleep, clock=clock)
        assert after.updates == 2 and not after.rejected

        for node, desk in desks.items():
            case, before_turn, before = first[node]
            _, turn, text = _ask(desk, _picture(node), case)
            assert desk.engine.status().notice is None
            assert text != before and text.strip() == CORRECTION
            current = adapters.current(homes[node])
            assert current is not None
            saved = queries.turn(desk.store, turn)
            assert saved.adapter_name == current.name and saved.adapter_sha256 == adapters.sha256(current)
            assert queries.turn(desk.store, before_turn).adapter_name is None
    finally:
        for desk in desks.values():
            desk.engine.stop()
            desk.store.close()
