"""A coordinator and three clinics without a network, for the tests of rounds by stick."""

import shutil
from pathlib import Path

from client import rounds_file
from model import phantoms
from server import certs, signing, usb
from server import checkpoint as store
from server.link import Link
from tests.client.clinic import fill
from tests.server import fakes

CLINICS = ("north", "south", "west")
VALUES = {"rank": 2, "local_steps": 8, "batch_size": 8, "min_clinics": 3, "num_server_rounds": 2, "gate": "off"}


class Coordinator:
    """A server's folders and three clinics' homes with their keys, and no network between them."""

    def __init__(self, root: Path, tiny: Path) -> None:
        self.root, self.link = root, Link(root / "certs", root / "state")
        certs.make(self.link.certs, CLINICS)
        signing.hand_out(self.link.certs)
        self.settings = fakes.settings(root / "rounds", tiny, **VALUES)
        self.homes = {}
        for number, name in enumerate(CLINICS):
            home = fill(root / name, phantoms.make(3, ["plain"], seed=number, size=48), tiny, "min_examples = 4")
            shutil.copytree(self.link.certs / "clinics" / name, home / "federation")
            self.homes[name] = home

    def issue(self, name: str = "round.afya") -> Path:
        usb.issue(self.link, self.settings, self.root / name)
        return self.root / name

    def reply(self, name: str, file: Path) -> Path:
        rounds_file.take(self.homes[name], file)
        rounds_file.give(self.homes[name], self.root / f"{name}.afya")
        return self.root / f"{name}.afya"

    def take(self, *files: Path) -> store.RoundCheckpoint:
        return usb.take(self.link, self.root / "rounds", files)

    def seen(self) -> tuple[list[str], int]:
        """What a refused file must leave as it was."""
        found, _ = store.latest(self.root / "rounds")
        assert found is not None
        return sorted(p.name for p in (self.root / "rounds").glob("round-*")), found.round
