"""Checkpoints of a stage: DeepSpeed's files under a temporary name, renamed when every process has written its part.

A folder `step-0000200` is whole or not there; what an interrupted write left is removed at the next save. Processes on
several hosts need a folder they share.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from model.files import sync_folder
from server.stage_log import StageStopped

_NAME = re.compile(r"step-(\d{7})")


class Checkpoints:
    """The checkpoints of one run in `folder`; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int, rank: int) -> None:
        self.folder, self.keep, self.rank = folder, keep, rank

    def save(self, engine: Any, step: int) -> None:
        """Write the state after `step` optimizer steps; every process calls this."""
        name = f"step-{step:07d}"
        partial = f".{name}.partial"
        if self.rank == 0:
            for left in self.folder.glob(".step-*.partial"):
                shutil.rmtree(left)
            self.folder.mkdir(parents=True, exist_ok=True)
        _together()
        engine.save_checkpoint(str(self.folder), tag=partial, client_state={"step": step}, save_latest=False)
        _together()
        if self.rank == 0:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / partial).rename(self.folder / name)
            sync_folder(self.folder)
            for old in self.all()[: -self.keep]:
                shutil.rmtree(old)
        _together()

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def load(self, engine: Any, trainable: str) -> int:
        """Load the newest checkpoint that can be read into the engine; returns its step, 0 where there is none."""
        for path in reversed(self.all()):
            try:
                found, state = engine.load_checkpoint(str(self.folder), tag=path.name)
            except (RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
                raise StageStopped(
                    f"The checkpoint {path} cannot be loaded ({str(error).splitlines()[0]}); the run must be resumed "
                    f"with the same model, recipe ({trainable}) and number of processes, or remove that folder."
                ) from error
            if found is not None:
                return int(state["step"])
        return 0


def _together() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
