"""Replies of a round on the disk instead of in memory, so that a server's memory does not grow with its clinics.

Each accepted reply becomes one file for each factor; its arrays are views of the mapped file, which the system pages in
layer by layer while they are put together, and drops again. What a crash leaves is removed when the next round begins.
"""

from pathlib import Path

import numpy as np

from model.adapters import State, factor


class Spool:
    """A folder for the replies of one round at a time."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which is made when the first reply comes."""
        self.folder = folder

    def put(self, node: int, state: State) -> State:
        """The same arrays, on the disk; those that `state` holds can be freed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found: State = {}
        for side in sorted({factor(name) for name in state}):
            names = sorted(name for name in state if factor(name) == side)
            path = self.folder / f"{node}-{side}.npy"
            np.save(path, np.concatenate([state[name].ravel() for name in names]), allow_pickle=False)
            vector = np.load(path, mmap_mode="r", allow_pickle=False)
            ends = np.cumsum([state[name].size for name in names])[:-1]
            parts = zip(names, np.split(vector, ends), strict=True)
            found |= {name: part.reshape(state[name].shape) for name, part in parts}
        return found

    def clear(self) -> None:
        """Remove what is there; mapped arrays stay readable until they are dropped (on POSIX)."""
        for path in self.folder.glob("*.npy"):
            path.unlink(missing_ok=True)
