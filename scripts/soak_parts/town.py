"""The clinics of a soak, the run that nothing happens to, and the deployment that the next case is done to.

Four clinics with a dozen synthetic pictures each: north and south take part, west lies, east is shut out. A deployment
serves case after case; after one that was not survived there is a new one. What a clinic does in a round (train, stand
in for training, lie) stands in its file under behaviour/ (`scripts.soak_parts.clinic`).
"""

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

from model import adapters, installed
from scripts.benches.simulation import small_model
from scripts.benches.simulation_clinics import home
from scripts.soak_parts.deployment import REFERENCE, Deployment, NotSurvived

CLINICS = ("north", "south", "west", "east")
HONEST, LATER = CLINICS[:2], CLINICS[2:]
PATIENCE = 240.0  # seconds after which something that must happen has not happened, on a machine with other work
FOLLOWED = "followed"  # the mode in which `afya-server rounds` looks on, and so learns that the ServerApp is gone
MEASURED = 2  # rounds that nothing happens to before the first case of a mode


class Town:
    """Everything that outlives a single case. `usual` holds seconds by mode: of a round, and of a ClientApp in it."""

    def __init__(self, work: Path, rounds: int = REFERENCE) -> None:
        """`rounds` is how long the undisturbed run is."""
        self.work, self.rounds = work, rounds
        self.base, self.homes = work / "base", dict[str, Path]()
        self.reference = work / "reference"
        self.usual: dict[str, dict[str, float]] = {}
        self._now: Deployment | None = None
        self._made = 0

    def behaviour(self, name: str) -> Path:
        """The file that says what a clinic does with a message."""
        return self.work / "behaviour" / name

    def behave(self, name: str, what: str) -> None:
        """From its next message on the clinic does this."""
        path = self.behaviour(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(what, encoding="utf-8")

    def __enter__(self) -> "Town":
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def abandon(self) -> None:
        """End the present deployment; the next case gets a new one."""
        if self._now is not None:
            self._now.stop()
            self._now = None

    def deployment(self) -> Deployment:
        """The deployment as it runs, with north and south there."""
        if not self.homes:
            self._build()
        if self._now is None:
            self._made += 1
            behaviours = {name: self.behaviour(name) for name in CLINICS}
            out = self.work / f"deployment-{self._made}"
            self._now = Deployment(self.homes, LATER, behaviours, out, self.base)
            _same_keys(self.work / "certs", out / "certs")
            self._now.__enter__()
            _same_keys(out / "certs", self.work / "certs")
        return self._now

    def _build(self) -> None:
        """The very small model and the clinics' homes; training is as urgent as everything else, so that rounds end."""
        small_model(self.base)
        for number, name in enumerate(CLINICS):
            self.homes[name] = home(self.work, self.base, number, 64)
            with open(self.homes[name] / "afya.toml", "a", encoding="utf-8") as settings:
                settings.write("nice = 0\n")
            self.behave(name, "quick")
        _install(self.base, self.work / "first", [self.homes[name] for name in HONEST])

    def ready(
        self, mode: str, trains: str, settings: dict[str, Any], compared: bool = False, anew: bool = False
    ) -> Deployment:
        """A deployment whose run has this mode's settings; `trains` is what north does: "train" or "quick".

        A run that is `compared` begins behind the first round of the undisturbed one and ends before that does.
        `anew` asks for a new run in any case.
        """
        now = self.deployment()
        now.follow = mode == FOLLOWED
        if compared and not self.reference.exists():
            self._undisturbed(now)
        done = max((event["round"] for event in now.look() if event["event"] == "round-done"), default=1)
        if anew or now.mode != mode or (compared and done > self.rounds - 2):
            self.behave(HONEST[0], trains)
            now.fresh(mode, self.reference if compared else None, settings)
            if trains not in self.usual:
                self.usual[trains] = _measure(now, MEASURED)
        return now

    def _undisturbed(self, now: Deployment) -> None:
        """The rounds that nothing happens to."""
        now.submit({"num-server-rounds": self.rounds, "min-clinics": len(HONEST), "round-deadline": PATIENCE})
        kept = self.work / "reference.partial"
        self.usual["quick"] = _measure(now, self.rounds, kept)
        now.wait("a release", PATIENCE, lambda: True if any(e["event"] == "finished" for e in now.seen) else None)
        kept.rename(self.reference)


def _same_keys(source: Path, target: Path) -> None:
    """Give every deployment the keys of the first: a clinic believes no other federation's."""
    if source.is_dir() and not target.exists():
        shutil.copytree(source, target)


def _install(base: Path, folder: Path, homes: list[Path]) -> None:
    """Give clinics an adapter in use, so that there is something to harm."""
    from model.llava import base_sha256

    folder.mkdir()
    state = adapters.initial(base, 2, 16.0, "decoder", 1)
    adapters.save(folder, state, adapters.spec_of(state, 16.0, base_sha256(base)))
    for one in homes:
        installed.install(one, folder, evidence={"round": 0})


def _measure(now: Deployment, rounds: int, keep: Path | None = None) -> dict[str, float]:
    """Median seconds of so many rounds, and of north's ClientApps in them; their checkpoints are copied into `keep`.

    Raises NotSurvived when they do not end.
    """
    lives: dict[psutil.Process, float] = {}
    end = time.monotonic() + rounds * PATIENCE
    while len(took := [e["seconds"] for e in now.look() if e["event"] == "round-done"]) < rounds:
        failed = [str(e["reason"]) for e in now.seen if e["event"] == "failed"]
        if failed or time.monotonic() > end:
            raise NotSurvived(
                f"a run that nothing happened to did not go on: {' '.join(failed) or 'it takes too long'}"
            )
        if (process := now.find("clientapp", HONEST[0])) is not None:
            lives[process] = time.time() - process.create_time()
        if keep is not None:
            _copy(now.root, keep)
        time.sleep(0.3)
    if keep is not None:
        _copy(now.root, keep)
    return {"round": statistics.median(took), "clientapp": statistics.median(lives.values())}


def _copy(root: Path, keep: Path) -> None:
    """Copy the checkpoints that are not there yet."""
    for folder in root.glob("round-*"):
        if not (keep / folder.name).exists():
            shutil.copytree(folder, keep / folder.name)
